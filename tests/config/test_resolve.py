import pytest

from resnet_jax.config import default_config, derive, flatten, load_config, resolve
from resnet_jax.errors import UserError

REFUSED = [
    # (field, value, what the sentence says)
    ("optimizer.learning_rat", 0.1, "did you mean optimizer.learning_rate"),
    ("training.learning_rate", 0.1, "did you mean optimizer.learning_rate"),
    ("training.batch_size", 8, "did you mean training.global_batch_size"),
    ("optimizer.lr", 0.1, "optimizer has learning_rate, momentum,"),
    ("seed", 2**31, "must be below"),
    ("optimizer.learning_rate", "fast", "takes a number, not 'fast'"),
    ("optimizer.learning_rate", float("nan"), "must be finite"),
    ("optimizer.momentum", 1.0, "must be below 1"),
    ("training.global_batch_size", 12.5, "takes an integer, not 12.5"),
    ("training.global_batch_size", True, "takes an integer, not True"),
    ("training.global_batch_size", 0, "must be at least 1"),
    ("augmentation.flip", 1, "takes true or false, not 1"),
    ("schedule.boundaries_steps", 5, "takes a tuple of integers or None, not 5"),
    ("model.dtype", "bfloat61", "did you mean bfloat16"),
    ("model.name", "resnet51", "did you mean resnet50"),
    ("model.name", "cifar_resnet21", "6n+2"),
    ("model.shortcut", "D", "one of A, B, C, pooled, none"),
    ("training.epochs", 2, "are both set"),
    ("training.steps", None, "set training.steps or training.epochs"),
    ("schedule.boundaries_epochs", (1,), "one unit a run"),
    ("schedule.warmup_epochs", 1, "one unit a run"),
    ("schedule.boundaries_steps", (5,), "piecewise needs boundaries"),
    ("schedule.kind", "piecewise", "piecewise needs boundaries"),
    ("schedule.kind", "plateau", "set data.holdout_examples"),
    ("schedule.warmup_until_error", 0.8, "go together"),
    ("checkpoint.best", True, "never on the test set"),
    ("model.batch_norm_groups", 3, "does not divide"),
    ("augmentation.shorter_side", (256, 480), "needs data.image_size"),
    ("data.eval_shorter_side", 256, "needs a data.image_size"),
]


def changed(config, name, value):
    *sections, key = name.split(".")
    for section in sections:
        config = config[section]
    config[key] = value


@pytest.mark.parametrize(("name", "value", "sentence"), REFUSED)
def test_refuses_in_one_sentence(name, value, sentence):
    config = default_config()
    config.training.steps = 10
    changed(config, name, value)
    with pytest.raises(UserError) as error:
        resolve(config)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"schedule.kind": "piecewise", "schedule.boundaries_steps": (8, 4)},
            "must increase",
        ),
        (
            {
                "schedule.warmup_steps": 5,
                "schedule.warmup_learning_rate": 0.01,
                "schedule.warmup_until_error": 0.8,
            },
            "give one",
        ),
        ({"optimizer.nesterov": True, "optimizer.momentum": 0.0}, "needs optimizer"),
        (
            {"data.image_size": 224, "augmentation.shorter_side": (256, 200)},
            "is (low, high)",
        ),
        (
            {"data.image_size": 224, "augmentation.shorter_side": (200, 256)},
            "no side below it",
        ),
        (
            {
                "data.image_size": 224,
                "augmentation.shorter_side": (256, 480),
                "augmentation.pad": 4,
            },
            "two ways to crop",
        ),
        (
            {
                "data.image_size": 224,
                "augmentation.shorter_side": (256, 480),
                "data.resident": True,
            },
            "data.resident cannot be true",
        ),
    ],
)
def test_refuses_contradictions_of_several_fields(changes, sentence):
    config = default_config()
    config.training.steps = 10
    for name, value in changes.items():
        changed(config, name, value)
    with pytest.raises(UserError) as error:
        resolve(config)
    assert sentence in str(error.value)


def test_a_resolved_config_resolves_to_itself():
    config = default_config()
    config.training.epochs = 2
    config.schedule.warmup_epochs = 1  # an integer for a number is taken
    resolved = resolve(config)
    assert resolve(resolved) == resolved
    assert resolved.training.epochs == 2.0
    assert isinstance(flatten(resolved)["schedule.warmup_epochs"], float)


def write_config(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text(
        "from resnet_jax.config import default_config\n"
        "def get_config(net='cifar_resnet20'):\n"
        "    config = default_config()\n"
        "    config.training.steps = 10\n"
        "    config.model.name = net\n" + body + "    return config\n"
    )
    return str(path)


def test_overrides_take_the_type_of_their_field(tmp_path):
    config = load_config(
        write_config(tmp_path, "") + ":cifar_plain56",
        {
            "optimizer.learning_rate": "5e-2",
            "training.steps": "64e3",
            "schedule.kind": "piecewise",
            "schedule.boundaries_steps": "32e3,48000",
            "augmentation.flip": "True",
            "model.shortcut": "none",
            "data.path": "None",
            "seed": "1",
            "data.name": "7",
        },
    )
    assert config.model.name == "cifar_plain56"
    assert config.optimizer.learning_rate == 0.05
    assert config.training.steps == 64_000
    assert config.schedule.boundaries_steps == (32_000, 48_000)
    assert config.augmentation.flip is True
    assert config.model.shortcut == "none"
    assert config.data.path is None
    assert config.seed == 1
    assert config.data.name == "7"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"optimizer.learning_rate": "fast"}, "takes a number, not 'fast'"),
        ({"training.steps": "1.5"}, "takes an integer or None, not 1.5"),
        ({"optimizer": "sgd"}, "is a section"),
        ({"sed": "1"}, "did you mean seed"),
        ({"training.epochs": "3"}, "are both set"),
    ],
)
def test_overrides_are_refused_in_one_sentence(tmp_path, overrides, sentence):
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path, ""), overrides)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("    config.optimizer.learning_rat = 1\n", "did you mean optimizer.learning"),
        ("    config.optimzer.learning_rate = 1\n", "optimzer"),
        ("    1 / 0\n", "line 6: ZeroDivisionError"),
        ("    config = {}\n", "must return a ConfigDict"),
    ],
)
def test_a_faulty_config_file_is_named(tmp_path, body, sentence):
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path, body))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.py does not exist"):
        load_config(str(tmp_path / "nothing.py"))


def test_an_argument_that_is_not_taken_is_refused(tmp_path):
    path = tmp_path / "fixed.py"
    path.write_text("def get_config():\n    return None\n")
    with pytest.raises(UserError, match="takes no argument"):
        load_config(f"{path}:cifar_resnet20")


def test_durations_in_epochs_are_counted_in_steps():
    config = default_config()
    config.training.epochs = 90
    config.training.global_batch_size = 256
    config.schedule.kind = "piecewise"
    config.schedule.boundaries_epochs = (30, 60)
    derived = derive(resolve(config), 1_281_167)
    # 1,281,167 / 256 = 5004.56 batches an epoch, none of them dropped.
    assert derived.steps == 450_411
    assert derived.boundaries == (150_137, 300_274)
    assert derived.evaluate_every == 5_005


def test_a_warm_up_longer_than_the_run_is_noted():
    config = default_config()
    config.training.steps = 12
    config.schedule.warmup_steps = 20
    (note,) = derive(resolve(config), 1000).notes()
    assert "warm-up of 20 steps is not over" in note


def test_a_fall_after_the_end_is_noted():
    config = default_config()
    config.training.steps = 200
    config.schedule.kind = "piecewise"
    config.schedule.boundaries_steps = (100, 32_000)
    notes = derive(resolve(config), 50_000).notes()
    assert len(notes) == 1
    assert "32000" in notes[0]
