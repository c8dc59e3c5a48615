"""What a config says of the net reaches the step: freezing, weights, regularisation."""

import jax
import numpy as np
import pytest

from resnet_jax import load_weights, save_weights
from resnet_jax.config import resolve
from resnet_jax.config.build import model_options
from resnet_jax.errors import UserError
from resnet_jax.evaluation.precise_statistics import check_precise_statistics
from resnet_jax.models import create_model, stack_blocks, unstack_blocks
from tests.training.helpers import host, parts


def run(config, steps, devices=1):
    """Parameters and statistics before and after some steps, on the host."""
    setup = parts(config, devices)
    given = setup.config.model.weights and load_weights(
        setup.config.model.weights,
        setup.learner.model,
        new_head=setup.config.model.new_head,
        rng=jax.random.key(0),
    )
    fresh = setup.fresh_state(given)
    before = host(fresh)
    state = setup.run(steps, fresh)
    assert int(state.first_bad_step) < 0
    return before, host(state)


def equal(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_frozen_parts_stay_with_their_statistics_and_the_others_learn(tiny_config):
    tiny_config.model.frozen = ("stem", "stage1")
    before, after = run(tiny_config, 3)
    for collection in ("params", "batch_stats"):
        for part in ("stem", "stage1"):
            assert equal(before[collection][part], after[collection][part])
        for part in ("stage2", "stage3"):
            assert not equal(before[collection][part], after[collection][part])
    assert not equal(before["params"]["head"], after["params"]["head"])


def test_statistics_alone_can_be_frozen(tiny_config, tmp_path):
    model = create_model("cifar_resnet8", num_classes=10)
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 1)))
    file = str(tmp_path / "weights.safetensors")
    save_weights(file, variables, model)
    tiny_config.model.update({"weights": file, "frozen_statistics": True})
    before, after = run(tiny_config, 2)
    assert equal(before["batch_stats"], after["batch_stats"])
    assert not equal(before["params"]["stem"], after["params"]["stem"])
    tiny_config.model.weights = None
    with pytest.raises(UserError, match=r"model\.frozen_statistics"):
        resolve(tiny_config)


def test_a_part_that_the_net_has_not_cannot_be_frozen(tiny_config):
    tiny_config.model.frozen = ("stem", "stage9")
    with pytest.raises(UserError, match=r"no part 'stage9'.*did you mean stage"):
        parts(tiny_config).learner.abstract_state()


def test_each_part_learns_at_its_own_rate(tiny_config):
    """The first step of two runs, in which gradients are the same."""
    moved = {}
    for decay in (1.0, 0.5):
        tiny_config.optimizer.layer_decay = decay
        before, after = run(tiny_config, 1)
        moved[decay] = jax.tree.map(np.subtract, after, before)["params"]
    parts_of_net = ["head", "stage3", "stage2", "stage1", "stem"]
    assert set(parts_of_net) == set(moved[1.0])
    for distance, part in enumerate(parts_of_net):
        expected = jax.tree.map(lambda x, d=distance: x * 0.5**d, moved[1.0][part])
        assert_close(moved[0.5][part], expected, atol=1e-6)
        assert not equal(expected, jax.tree.map(np.zeros_like, expected))


def test_a_run_starts_from_given_weights(tiny_config, tmp_path):
    model = create_model("cifar_resnet8")
    rng = np.random.default_rng(0)
    shapes = parts(tiny_config).learner.abstract_state()
    given = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32),
        {"params": shapes.params, "batch_stats": shapes.batch_stats},
    )
    file = tmp_path / "given.safetensors"
    save_weights(file, given, model)
    tiny_config.model.weights = str(file)
    tiny_config.optimizer.ema_decay = 0.9
    # Averages and parameters start equal, and must not share what the step donates.
    before, after = run(tiny_config, 1)
    assert equal(before, given)
    assert not equal(before, after)

    tiny_config.model.new_head = True
    before, _ = run(tiny_config, 0)
    assert equal(before["params"]["stage3"], given["params"]["stage3"])
    assert not equal(before["params"]["head"], given["params"]["head"])

    tiny_config.model.name = "cifar_resnet14"
    with pytest.raises(UserError, match=r"given\.safetensors does not match"):
        run(tiny_config, 0)


def test_stochastic_depth_is_the_same_on_eight_devices(tiny_config):
    tiny_config.model.stochastic_depth_rate = 0.5
    _, one = run(tiny_config, 2)
    _, eight = run(tiny_config, 2, devices=8)
    assert_close(one, eight, atol=2e-4)
    tiny_config.model.stochastic_depth_rate = None
    _, plain = run(tiny_config, 2)
    with pytest.raises(AssertionError):
        assert_close(one, plain, atol=2e-3)


def test_a_scanned_net_trains_as_the_unrolled_one(tiny_config, tmp_path):
    tiny_config.model.name = "cifar_resnet14"
    start, unrolled = run(tiny_config, 2)
    file = tmp_path / "start.safetensors"
    save_weights(file, start, create_model("cifar_resnet14"))
    tiny_config.model.weights = str(file)
    tiny_config.model.scan = tiny_config.model.remat = True
    before, scanned = run(tiny_config, 2)
    assert equal(before["params"], stack_blocks(start["params"]))
    assert_close(unstack_blocks(scanned), unrolled, atol=2e-4)


def test_fused_normalisations_train_as_the_plain_ones(tiny_config):
    """On eight devices as on one, in micro-batches of whole groups."""
    tiny_config.model.batch_norm_groups = tiny_config.training.micro_batches = 2
    _, fused = run(tiny_config, 2, devices=8)
    tiny_config.model.fused_norm = False
    _, plain = run(tiny_config, 2)
    assert_close(fused, plain, atol=2e-4)


def test_nets_without_batch_normalisation_train(tiny_config):
    tiny_config.model.name = "cifar_highway19"
    tiny_config.model.dropout_rate = 0.2
    tiny_config.optimizer.learning_rate = 0.01
    before, after = run(tiny_config, 1)
    assert before["batch_stats"] == after["batch_stats"] == {}
    assert not equal(before["params"], after["params"])


def test_only_what_is_set_reaches_create_model(tiny_config):
    assert model_options(resolve(tiny_config).model) == {}
    tiny_config.model.shortcut = "B"
    tiny_config.model.zero_init_last = True
    tiny_config.model.frozen = ("stem",)
    options = model_options(resolve(tiny_config).model)
    assert options == {"shortcut": "B", "zero_init_last": True}


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("cifar_highway19", "batch_norm_groups", 2),
        ("cifar_resnet20", "gate_bias", -1.0),
        ("vgg16", "scan", True),
        ("vgg16", "normalization", "none"),
        ("mnist_plain10", "batch_norm_groups", 2),
    ],
)
def test_options_that_a_net_has_not_are_refused(tiny_config, name, option, value):
    tiny_config.model.name = name
    tiny_config.model[option] = value
    with pytest.raises(UserError, match=f"model {name} has no option {option}"):
        resolve(tiny_config)


def test_fresh_kernels_and_given_weights_exclude_each_other(tiny_config):
    tiny_config.model.initialization = "xavier"
    tiny_config.model.weights = "given.safetensors"
    with pytest.raises(
        UserError, match=r"^model\.initialization=xavier .* set only one$"
    ):
        resolve(tiny_config)


@pytest.mark.parametrize(
    ("section", "field", "value", "sentence"),
    [
        ("model", "batch_norm_groups", 2, "^batch_norm_groups=2 acts on batch"),
        ("model", "zero_init_last", True, "^zero_init_last=True acts on batch"),
        (
            "evaluation",
            "precise_statistics_examples",
            8,
            "needs batch normalisation, and cifar_plain8 has none: set it to 0$",
        ),
    ],
)
def test_what_needs_batch_normalisation_is_refused_without(
    tiny_config, section, field, value, sentence
):
    tiny_config.model.name = "cifar_plain8"
    tiny_config.model.normalization = "none"
    tiny_config[section][field] = value

    def check():
        learner = parts(tiny_config).learner
        check_precise_statistics(learner.config, learner.abstract_state().batch_stats)

    with pytest.raises(UserError, match=sentence):
        check()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cifar_plain8", {"normalization": "none", "initialization": "he_fan_in"}),
        ("cifar_resnet8", {"shortcut": "exclusive_gate", "gate_bias": -3.0}),
        ("cifar_resnet8", {"shortcut": "dropout"}),
        ("cifar_overlapping_resnet8", {}),
        ("mnist_highway10", {"gate_bias": -1.0, "initialization": "xavier"}),
        ("mnist_plain10", {}),
    ],
)
def test_the_nets_of_the_small_experiments_train(tiny_config, name, options):
    tiny_config.model.name = name
    tiny_config.model.update(options)
    tiny_config.optimizer.learning_rate = 0.01
    before, after = run(tiny_config, 1)
    assert not equal(before["params"], after["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_a_fresh_head_needs_weights(tiny_config):
    tiny_config.model.new_head = True
    with pytest.raises(UserError, match=r"model\.new_head.* model\.weights"):
        resolve(tiny_config)


def test_weights_of_a_run_can_be_loaded(tiny_config, tmp_path):
    """What a notebook does with a trained net, by way of a file."""
    _, after = run(tiny_config, 2)
    model = create_model("cifar_resnet8")
    save_weights(tmp_path / "run.safetensors", after, model)
    assert equal(load_weights(tmp_path / "run.safetensors", model), after)
