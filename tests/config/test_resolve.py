import math
import re

import pytest

from resnet_jax.cli.overrides import fields_help, parse_overrides
from resnet_jax.config import (
    default_config,
    derive,
    fields,
    flatten,
    load_config,
    resolve,
)
from resnet_jax.errors import UserError
from resnet_jax.options import check
from tests.conftest import REPOSITORY

DIGITS = str(REPOSITORY / "configs" / "digits.py")

REFUSED = [
    # (field, value, what the sentence says)
    ("optimizer.learning_rat", 0.1, "did you mean optimizer.learning_rate"),
    ("training.learning_rate", 0.1, "did you mean optimizer.learning_rate"),
    ("training.batch_size", 8, "did you mean training.global_batch_size"),
    ("data.batch_size", 8, "did you mean training.global_batch_size"),
    ("optimizer.lr", 0.1, "did you mean optimizer.learning_rate?"),
    ("optimizer.zzz", 0.1, "optimizer has kind, arguments, learning_rate,"),
    ("seed", 2**31, "from 0 to 2,147,483,647, not 2147483648"),
    ("optimizer.learning_rate", "fast", "takes a number, not 'fast'"),
    ("optimizer.learning_rate", float("nan"), "must be from 0 to 1e+38, not nan"),
    ("optimizer.momentum", 1.0, "from 0 to 0.999999, not 1.0"),
    ("training.global_batch_size", 12.5, "takes an integer, not 12.5"),
    ("training.global_batch_size", True, "takes an integer, not True"),
    ("training.global_batch_size", 0, "must be from 1 to 1,048,576"),
    ("augmentation.flip", 1, "takes true or false, not 1"),
    ("schedule.boundaries_steps", 5, "takes a tuple of integers or None, not 5"),
    ("model.dtype", "bfloat61", "did you mean bfloat16"),
    ("model.name", "resnet51", "did you mean resnet50"),
    ("model.name", "cifar_resnet21", "6n+2"),
    ("model.shortcut", "D", "one of A, B, C, pooled, none"),
    ("training.epochs", 2, "exclude each other"),
    ("training.steps", None, "set training.steps or training.epochs"),
    ("schedule.boundaries_epochs", (1,), "set schedule.boundaries_steps instead"),
    ("schedule.warmup_epochs", 1, "set schedule.warmup_steps instead"),
    ("schedule.boundaries_steps", (5,), "piecewise needs boundaries"),
    ("schedule.kind", "piecewise", "piecewise needs boundaries"),
    ("schedule.kind", "plateau", "set data.holdout_examples"),
    ("schedule.warmup_until_error", 0.8, "needs schedule.warmup_learning_rate"),
    ("checkpoint.best", True, "never the test error"),
    ("model.batch_norm_groups", 3, "does not divide"),
    ("augmentation.shorter_side", (256, 480), "needs data.image_size"),
    ("data.eval_shorter_side", 256, "needs data.image_size"),
    ("data.eval_image_size", 224, "needs data.image_size"),
    ("augmentation.crop_area", (0.08, 1.0), "needs data.image_size"),
    ("augmentation.crop_area", (0.5, 0.1), "is (low, high)"),
    ("augmentation.crop_area", (0.0, 1.0), "must be from 0.0001 to 1"),
    ("augmentation.crop_area", (0.08, 1.1), "must be from 0.0001 to 1"),
    ("augmentation.crop_area", (0.08,), "is (low, high)"),
    (
        "augmentation.crop_aspect",
        (0.5, 2.0),
        "needs augmentation.crop_area: set it too",
    ),
    ("augmentation.crop_aspect", (2.0, 0.5), "is (low, high)"),
    ("augmentation.crop_aspect", (0.0, 1.0), "must be from 0.01 to 100"),
    ("augmentation.policy", "randaug", "did you mean randaugment"),
    ("augmentation.policy_operations", 3, "needs augmentation.policy=randaugment, but"),
    ("augmentation.policy_magnitude", 7.0, "to 9.0"),
    ("augmentation.policy_magnitude", 11.0, "must be from 0 to 10"),
    ("augmentation.repeats", 200, "is above training.global_batch_size=128"),
    ("augmentation.color_jitter", (0.4, 0.4), "(brightness, contrast, saturation)"),
    ("augmentation.color_jitter", (0.4, 0.4, 1.5), "from 0 to 1, not (0.4, 0.4, 1.5)"),
    ("augmentation.color_jitter", (0.4, -0.1, 0.4), "from 0 to 1, not"),
    ("augmentation.erasing_probability", 1.0005, "from 0 to 1, not"),
    ("augmentation.mixup_alpha", -0.1, "from 0 to 1,000"),
    ("loss.kind", "sigmiod", "did you mean sigmoid"),
    ("loss.label_smoothing", 1.0, "from 0 to 0.999999"),
    ("loss.target_threshold", 0.2, "needs loss.kind=sigmoid"),
    ("optimizer.kind", "lamp", "did you mean lamb"),
    ("optimizer.kind", "adamm", "did you mean adam"),
    ("optimizer.kind", "adam", "no weight decay: set optimizer.weight_decay=0"),
    ("optimizer.arguments", ("b2=0.9",), "but optimizer.kind is sgd"),
    ("optimizer.second_momentum", 0.99, "needs optimizer.kind=lamb"),
    ("optimizer.epsilon", 1e-8, "reset optimizer.epsilon to 1e-06"),
    ("optimizer.trust_coefficient", 0.02, "needs optimizer.kind=lars, but it is sgd"),
    ("optimizer.weight_decay_scope", "none", "one of all, all_but_norm, kernels"),
    ("optimizer.max_grad_norm", 0.0, "must be above 0"),
    ("optimizer.layer_decay", 0.0, "must be above 0"),
    ("optimizer.layer_decay", 1.5, "from 0 to 1, not 1.5"),
    ("optimizer.ema_every_steps", 32, "optimizer.ema_decay"),
    ("schedule.final_learning_rate", 0.01, "schedule.kind=cosine or polynomial"),
    ("schedule.power", 1.0, "needs schedule.kind=polynomial, but it is constant"),
    ("evaluation.precise_statistics_examples", -1, "must be from 0 to"),
    ("schedule.warmup_initial_learning_rate", 0.01, "schedule.warmup_steps or"),
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
    refuses_once(error, sentence)


def refuses_once(error, sentence):
    """Whether one of the faults, each a line, says the sentence."""
    first, *faults = str(error.value).split("\n")
    assert sum(sentence in fault for fault in faults or [first]) == 1
    assert not faults or first == f"{len(faults)} faults in the config:"


CROP = {"data.image_size": 224, "augmentation.crop_area": (0.08, 1.0)}
SIDE = {"data.image_size": 224, "augmentation.shorter_side": (256, 480)}
OTHER_SIZE = {"data.image_size": 160, "data.eval_image_size": 224}
BY_ERROR = {"schedule.warmup_learning_rate": 0.01, "schedule.warmup_until_error": 0.8}
TRIVIAL = {"augmentation.policy": "trivialaugment"}
RANDOM = {"augmentation.policy": "randaugment"}
POLYNOMIAL = {"schedule.kind": "polynomial"}
PIECEWISE = {"schedule.kind": "piecewise"}
ADAMW = {"optimizer.kind": "adamw"}
LAMB, LARS = {"optimizer.kind": "lamb"}, {"optimizer.kind": "lars"}
CONTRADICTIONS = [
    (PIECEWISE | {"schedule.boundaries_steps": (8, 4)}, "must increase"),
    (BY_ERROR | {"schedule.warmup_steps": 5}, "exclude each other: set only one"),
    ({"optimizer.nesterov": True, "optimizer.momentum": 0.0}, "needs optimizer"),
    (SIDE | {"augmentation.shorter_side": (256, 200)}, "is (low, high)"),
    (SIDE | {"augmentation.shorter_side": (200, 256)}, "not be below data.image_size"),
    (SIDE | {"augmentation.pad": 4}, "augmentation.pad=4 exclude each other"),
    (SIDE | {"data.resident": True}, "data.resident=True exclude each other"),
    (SIDE | CROP, "augmentation.crop_area=(0.08, 1.0) exclude each other"),
    (CROP | {"augmentation.pad": 4}, "augmentation.pad=4 exclude each other"),
    (CROP | {"data.resident": True}, "data.resident=True exclude each other"),
    (RANDOM | {"data.resident": True}, "data.resident=True exclude each other"),
    (TRIVIAL | {"augmentation.policy_magnitude": 7.0}, "but it is trivialaugment"),
    (RANDOM | {"augmentation.policy_magnitude": 10.0005}, "from 0 to 10, not 10.0005"),
    (
        {"augmentation.mixup_alpha": 0.2, "training.global_batch_size": 1},
        "mixup and cutmix mix pairs",
    ),
    (
        {"augmentation.cutmix_alpha": 1.0, "training.global_batch_size": 1},
        "mixup and cutmix mix pairs",
    ),
    (LAMB | {"optimizer.nesterov": True}, "needs optimizer.kind=sgd or lars"),
    (LARS | {"optimizer.trust_coefficient": 0.0}, "must be above 0"),
    (LARS | {"optimizer.epsilon": 1e-8}, "needs optimizer.kind=lamb"),
    (POLYNOMIAL | {"schedule.power": 0.0}, "schedule.power must be above 0"),
    (
        POLYNOMIAL | {"schedule.final_learning_rate": 0.2},
        "above optimizer.learning_rate=0.1",
    ),
    (
        {"schedule.warmup_steps": 5, "schedule.warmup_initial_learning_rate": 0.2},
        "above optimizer.learning_rate=0.1",
    ),
    (ADAMW | {"optimizer.momentum": 0.8}, "reset optimizer.momentum to 0.9"),
    (ADAMW | {"optimizer.arguments": ("b3=0.9",)}, "are b1, b2, eps, eps_root,"),
    (ADAMW | {"optimizer.arguments": ("mask=1",)}, "nesterov, not mask"),
    (ADAMW | {"optimizer.arguments": ("b2",)}, "takes NAME=VALUE, not 'b2'"),
    (
        {"optimizer.kind": "novograd", "optimizer.weight_decay_scope": "kernels"},
        "set optimizer.weight_decay_scope=all",
    ),
    (OTHER_SIZE, "set data.normalization=per_channel or imagenet"),
    (
        OTHER_SIZE | {"data.normalization": "imagenet"},
        "set augmentation.crop_area or augmentation.shorter_side",
    ),
    (CROP | {"data.eval_shorter_side": 200}, "below the image size of evaluation, 224"),
]


@pytest.mark.parametrize(("changes", "sentence"), CONTRADICTIONS)
def test_refuses_contradictions_of_several_fields(changes, sentence):
    config = default_config()
    config.training.steps = 10
    for name, value in changes.items():
        changed(config, name, value)
    with pytest.raises(UserError) as error:
        resolve(config)
    refuses_once(error, sentence)


def test_every_number_has_two_bounds_that_its_default_meets():
    for name, field in fields().items():
        is_number = {"int", "float"} & set(re.findall(r"\w+", str(field.annotation)))
        if not is_number:
            continue
        assert -math.inf < field.at_least < field.at_most < math.inf, name
        one = (lambda x: (x,)) if "tuple" in str(field.annotation) else (lambda x: x)
        assert check(field, one(field.at_most)) == one(field.at_most)
        too_low, too_high = field.at_least - 1, 2 * field.at_most + 1
        for value in (too_low, too_high, 10**400, -(10**5000)):
            with pytest.raises(UserError, match="must be from") as error:
                check(field, one(value))
            assert len(str(error.value)) < 250
        if field.default is not None:
            check(field, field.default)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seed", "9" * 400),
        ("seed", "9" * 20_000),
        ("seed", "-" * 20_000),
        ("seed", "(" * 5000),
        ("seed", "1e30"),
        ("seed", "inf"),
        ("training.epochs", "1e308"),
        ("training.epochs", "9" * 400),
        ("optimizer.learning_rate", "nan"),
        ("augmentation.crop_area", "0.1,nan"),
        ("augmentation.shorter_side", "[" * 5000),
        ("schedule.boundaries_steps", "1," * 1001),
        ("schedule.boundaries_steps", "1e30,2"),
        ("profile.steps", "1:" + "9" * 5000),
        ("data.path", ""),
        ("data.path", "a\0b"),
        ("data.path", "a" * 5000),
        ("model.frozen", "a" * 5000),
    ],
)
def test_text_without_sense_is_one_short_sentence(name, text):
    with pytest.raises(UserError) as error:
        load_config(DIGITS, {name: text})
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_lengths_that_multiply_beyond_all_sense_are_refused():
    config = default_config()
    config.training.epochs = 1e6
    with pytest.raises(UserError, match=r"1e.06 epochs of 10,000,000,000 examples are"):
        derive(resolve(config), 10**10)
    config.training.global_batch_size = 2**20
    config.data.image_size = 8192
    with pytest.raises(UserError, match="1048576 images of 8192 x 8192 pixels"):
        resolve(config)


@pytest.mark.parametrize(
    ("file", "overrides"),
    [
        ("mnist.py", {"training.steps": "4"}),
        ("folder.py", {"training.steps": "4"}),
        ("digits.py", {"training.epochs": "1"}),
        ("cifar10.py", {"training.epochs": "1"}),
    ],
)
def test_the_overrides_that_a_refusal_proposes_work(file, overrides):
    """A recipe counted in the other unit is shortened by copying them."""
    spec = str(REPOSITORY / "configs" / file)
    with pytest.raises(UserError, match="exclude each other") as error:
        load_config(spec, overrides)
    assert "\n" not in str(error.value)
    by_steps, by_epochs = re.findall(r"add ([^;]+)", str(error.value))
    for proposed in (by_steps, by_epochs):
        more = parse_overrides(proposed.split())
        load_config(spec, overrides | more)
    own = by_steps if "training.steps" in overrides else by_epochs
    config = load_config(spec, overrides | parse_overrides(own.split()))
    assert (
        flatten(config).items()
        >= {name: float(text) for name, text in overrides.items()}.items()
    )


def test_all_contradictions_are_listed():
    config = default_config()
    config.training.steps = 10
    config.model.name = "resnet51"
    config.checkpoint.best = True
    config.profile.steps = "7"
    with pytest.raises(UserError) as error:
        resolve(config)
    first, *faults = str(error.value).split("\n")
    assert first == "3 faults in the config:"
    for fault, text in zip(faults, ("resnet50", "FIRST", "held-out"), strict=True):
        assert text in fault


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
        ({"training.epochs": "3"}, "exclude each other"),
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
    assert "before the warm-up of 20 steps is over" in note


def test_a_fall_after_the_end_is_noted():
    config = default_config()
    config.training.steps = 200
    config.schedule.kind = "piecewise"
    config.schedule.boundaries_steps = (100, 32_000)
    notes = derive(resolve(config), 50_000).notes()
    assert len(notes) == 1
    assert "32000" in notes[0]


def test_removed_fields_of_old_runs_load_at_their_defaults():
    old = {"model": {"norm_arithmetic": "wide", "stem_form": "conv"}}
    config = {"training": {"steps": 10}}
    assert resolve(config | old) == resolve(config)
    for value in ("two_pass", "fast"):
        old = {"model": {"norm_variance": value}}
        assert resolve(config | old) == resolve(config)
    old = {"model": {"conv_algorithm": "pointwise"}}
    assert resolve(config | old) == resolve(config)
    for name, value in (("norm_arithmetic", "narrow"), ("stem_form", "four_channels")):
        with pytest.raises(UserError, match=f"model.{name} no longer exists"):
            resolve(config | {"model": {name: value}})


def test_a_resolved_config_is_returned_as_it_is():
    config = resolve({"training": {"steps": 10}})
    assert resolve(config) is config


def test_help_shows_the_limits_of_numbers():
    lines = fields_help().splitlines()
    assert (
        "  training.steps = None  (an integer or None, from 1 to 1,000,000,000)"
        in lines
    )
    assert "  optimizer.momentum = 0.9  (a number, from 0 to 0.999999)" in lines
    assert "  data.test_split = test  (a string)" in lines


def test_overrides_from_a_notebook_need_not_be_text():
    config = load_config("digits", {"optimizer.learning_rate": 0.3, "seed": 2})
    assert (config.optimizer.learning_rate, config.seed) == (0.3, 2)
    with pytest.raises(UserError, match=r"seed takes an integer, not 2\.5"):
        load_config("digits", {"seed": 2.5})
    with pytest.raises(UserError, match=r"take the one that resnet_jax\.load_config"):
        resolve("digits")
