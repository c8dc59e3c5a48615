"""Nets without normalisation, and the choice of initialisation."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from resnet_jax.errors import UserError
from resnet_jax.models import (
    BasicBlock,
    CifarStem,
    NoNorm,
    PreActBasicBlock,
    ResNet,
    create_model,
    precise_batch_stats,
    shortcuts,
    stack_blocks,
)
from tests.models.reference import (
    KEY,
    apply,
    convolution,
    random_variables,
    relu,
    torch_or_skip,
)

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def unnormalized(letter, **fields):
    options = {"stem": CifarStem, "width": 4, "num_classes": 3}
    shortcut = shortcuts.BY_NAME[letter]
    return ResNet((2, 1), BasicBlock, shortcut, norm=NoNorm, **options).clone(**fields)


def biased(x, layer, strides=1):
    return convolution(x, layer["kernel"], strides) + layer["bias"]


def in_numpy(images, params, letter):
    x = relu(biased(images, params["stem"]["conv"]))
    for stage, strides, blocks in (("stage1", 1, 2), ("stage2", 2, 1)):
        for number in range(1, blocks + 1):
            block, step = params[stage][f"block{number}"], strides
            y = biased(relu(biased(x, block["conv1"], step)), block["conv2"])
            if letter == "A":
                x = x[:, ::step, ::step]
                channels = y.shape[-1] - x.shape[-1]
                y = y + np.pad(x, ((0, 0), (0, 0), (0, 0), (0, channels)))
            elif letter == "C":
                y = y + biased(x, block["shortcut_conv"], step)
            x = relu(y)
    head = params["head"]
    return x.mean((1, 2)) @ head["kernel"] + head["bias"]


@pytest.mark.parametrize("letter", ["A", "C", "none"])
def test_a_net_without_normalisation_is_convolutions_with_biases(letter):
    model = unnormalized(letter)
    variables = random_variables(model, IMAGES)
    assert set(variables) == {"params"}
    params = jax.tree.map(np.float64, variables["params"])
    expected = in_numpy(IMAGES, params, letter)
    np.testing.assert_allclose(
        apply(model, variables, IMAGES), expected, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        apply(model, variables, IMAGES, train=True), expected, rtol=1e-4, atol=1e-4
    )


def test_the_plain_net_is_torchs_sequence_of_layers():
    torch = torch_or_skip()
    model = unnormalized("none", stage_sizes=(1, 1))
    params = random_variables(model, IMAGES)["params"]
    blocks = [params[f"stage{i}"]["block1"] for i in (1, 2)]
    convs = [params["stem"]["conv"]] + [b[f"conv{i}"] for b in blocks for i in (1, 2)]
    x = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2))
    for index, conv in enumerate(convs):
        weight = torch.from_numpy(conv["kernel"].transpose(3, 2, 0, 1))
        bias = torch.from_numpy(conv["bias"])
        stride = 2 if index == 3 else 1
        x = torch.nn.functional.conv2d(x, weight, bias, stride, padding=1).relu()
    pooled = x.mean((2, 3)).numpy()
    expected = pooled @ params["head"]["kernel"] + params["head"]["bias"]
    ours = apply(model, {"params": params}, IMAGES)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cifar_plain8", "cifar_resnet8"])
def test_a_bias_stands_for_scale_and_bias_of_the_normalisation(name):
    def count(**options):
        model = create_model(name, **options)
        shapes = jax.eval_shape(model.init, KEY, IMAGES)["params"]
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    channels = 3 * 16 + 2 * 32 + 2 * 64
    assert count() - count(normalization="none") == channels


def test_biases_start_at_zero():
    params = jax.jit(unnormalized("C").init)(KEY, IMAGES)["params"]
    params.pop("head")
    for path, leaf in traverse_util.flatten_dict(params).items():
        assert np.any(leaf) == (path[-1] == "kernel"), path


def test_preactivation_without_normalisation():
    """ReLU and convolution in turn, and a ReLU before the pooling."""
    model = unnormalized("A", stage_sizes=(1,), block=PreActBasicBlock)
    variables = random_variables(model, IMAGES)
    params = jax.tree.map(np.float64, variables["params"])
    stem, block = params["stem"]["conv"], params["stage1"]["block1"]
    x = relu(biased(IMAGES, stem))
    y = biased(relu(biased(x, block["conv1"])), block["conv2"])
    pooled = relu(x + y).mean((1, 2))
    expected = pooled @ params["head"]["kernel"] + params["head"]["bias"]
    ours = apply(model, variables, IMAGES)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_as_a_loop_it_is_the_same(remat):
    model = unnormalized("A", stage_sizes=(3, 2))
    variables = random_variables(model, IMAGES)
    looped = model.clone(scan=True, remat=remat)
    np.testing.assert_allclose(
        apply(looped, stack_blocks(variables), IMAGES, train=True),
        apply(model, variables, IMAGES, train=True),
        rtol=1e-5,
        atol=1e-5,
    )


def test_any_linen_normalisation_can_be_given():
    """Its own options stay; only BatchNorm's are set by the net."""
    model = unnormalized("A", norm=functools.partial(nn.GroupNorm, num_groups=2))
    shapes = jax.eval_shape(model.init, KEY, IMAGES)
    assert set(shapes) == {"params"}
    norm = shapes["params"]["stage2"]["block1"]["norm2"]
    assert jax.tree.map(np.shape, norm) == {"scale": (8,), "bias": (8,)}
    assert "bias" not in shapes["params"]["stage2"]["block1"]["conv2"]


def test_there_are_no_statistics_to_recompute():
    model = unnormalized("A")
    variables = random_variables(model, IMAGES)
    with pytest.raises(UserError, match="no batch statistics to recompute"):
        precise_batch_stats(model, variables, [IMAGES])


# Initialisation


@pytest.mark.parametrize(
    ("initialization", "std"),
    [
        (None, np.sqrt(2 / (9 * 64))),
        ("he", np.sqrt(2 / (9 * 64))),
        ("he_fan_in", np.sqrt(2 / (9 * 32))),
        ("xavier", np.sqrt(2 / (9 * (32 + 64)))),
        ("normal_0.01", 0.01),
    ],
)
def test_the_spread_of_the_first_kernels(initialization, std):
    model = create_model("cifar_resnet8", initialization=initialization)
    params = jax.jit(model.init)(KEY, IMAGES)["params"]
    kernel = np.asarray(params["stage3"]["block1"]["conv1"]["kernel"])
    assert kernel.shape == (3, 3, 32, 64)
    assert kernel.std() == pytest.approx(std, rel=0.03)
    assert abs(kernel.mean()) < 5 * std / np.sqrt(kernel.size)
    # A uniform distribution ends at sqrt(3) deviations, a normal one does not.
    is_uniform = np.abs(kernel).max() <= np.sqrt(3) * std
    assert is_uniform == (initialization == "xavier")
    stem = np.asarray(params["stem"]["conv"]["kernel"])
    if initialization == "normal_0.01":
        assert stem.std() == pytest.approx(0.01, rel=0.15)


def test_the_classifier_keeps_its_own():
    ours, own = (
        jax.jit(create_model("cifar_resnet8", **options).init)(KEY, IMAGES)["params"]
        for options in ({"initialization": "normal_0.01"}, {})
    )
    np.testing.assert_array_equal(ours["head"]["kernel"], own["head"]["kernel"])
    assert np.any(ours["stem"]["conv"]["kernel"] != own["stem"]["conv"]["kernel"])
