"""Blocks against the papers' equations, written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.models import (
    BasicBlock,
    BatchNorm,
    BottleneckBlock,
    Conv,
    PreActBasicBlock,
    PreActBottleneckBlock,
    shortcuts,
)
from resnet_jax.models.wrappers import dropout_between
from tests.models.reference import KEY, Layers, apply, random_variables, relu

EVALUATING = functools.partial(BatchNorm, use_running_average=True)
TRAINING = functools.partial(BatchNorm, use_running_average=False)
BARE = shortcuts.Projection(normalized=False)


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(2, 5, 5, 4)).astype(np.float32)


def assert_close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def pad_shortcut(x, strides, features):
    return np.pad(
        x[:, ::strides, ::strides], [(0, 0)] * 3 + [(0, features - x.shape[-1])]
    )


def residual_function(layers, x, strides, strided=1, activation=relu):
    """Convolution ``strided`` strides; an activation follows all but the last."""
    count = sum(name.startswith("conv") for name in layers.params)
    y = x
    for i in range(1, count + 1):
        y = layers.conv(y, f"conv{i}", strides if i == strided else 1)
        y = layers.norm(y, f"norm{i}")
        y = activation(y) if i < count else y
    return y


@pytest.mark.parametrize(
    ("strides", "features", "letter"),
    [(1, 4, "A"), (1, 4, "C"), (1, 4, "none"), (2, 6, "A"), (2, 6, "B")],
)
def test_basic_block_is_equation_1(x, strides, features, letter):
    block = BasicBlock(features, strides, EVALUATING, shortcuts.BY_NAME[letter])
    variables = random_variables(block, x)
    layers = Layers(variables)
    y = residual_function(layers, x, strides)
    if letter == "A":
        y += pad_shortcut(x, strides, features)
    elif letter != "none":
        y += layers.norm(layers.conv(x, "shortcut_conv", strides), "shortcut_norm")
    assert_close(apply(block, variables, x), relu(y))


@pytest.mark.parametrize("num_convs", [1, 2, 3, 4])
def test_a_basic_block_of_any_number_of_convolutions(x, num_convs):
    block = BasicBlock(6, 2, EVALUATING, shortcuts.ZeroPad(), num_convs=num_convs)
    variables = random_variables(block, x)
    kernels = {
        name: leaves["kernel"].shape
        for name, leaves in variables["params"].items()
        if "kernel" in leaves
    }
    assert kernels == {
        f"conv{i}": (3, 3, 4 if i == 1 else 6, 6) for i in range(1, num_convs + 1)
    }
    assert len(variables["params"]) == 2 * num_convs
    y = residual_function(Layers(variables), x, 2) + pad_shortcut(x, 2, 6)
    assert_close(apply(block, variables, x), relu(y))


@pytest.mark.parametrize(("stride_version", "strided"), [("v1", 1), ("v1.5", 2)])
def test_bottleneck_strides_where_its_version_says(x, stride_version, strided):
    block = BottleneckBlock(
        3, 2, EVALUATING, shortcuts.ZeroPad(), stride_version=stride_version
    )
    variables = random_variables(block, x)
    y = residual_function(Layers(variables), x, 2, strided) + pad_shortcut(x, 2, 12)
    assert_close(apply(block, variables, x), relu(y))


@pytest.mark.parametrize(
    ("groups", "base_width", "width"), [(1, 64, 16), (1, 128, 32), (4, 16, 16)]
)
def test_grouped_and_wide_bottlenecks(x, groups, base_width, width):
    """Of the 3x3: ``groups`` groups of 16 base_width / 64 channels each."""
    block = BottleneckBlock(
        16, 1, EVALUATING, shortcuts.ZeroPad(), groups=groups, base_width=base_width
    )
    variables = random_variables(block, x)
    layers = Layers(variables)
    shapes = [layers.params[f"conv{i}"]["kernel"].shape for i in (1, 2, 3)]
    assert shapes == [
        (1, 1, 4, width),
        (3, 3, width // groups, width),
        (1, 1, width, 64),
    ]
    y = relu(layers.norm(layers.conv(x, "conv1"), "norm1"))
    y = relu(layers.norm(layers.conv(y, "conv2", groups=groups), "norm2"))
    y = layers.norm(layers.conv(y, "conv3"), "norm3") + pad_shortcut(x, 1, 64)
    assert_close(apply(block, variables, x), relu(y))


def preactivated(layers, x, strides, position, shortcut, between=lambda y: y):
    """He et al. 2016, figure 4e and appendix: BN, ReLU and convolution in turn."""
    count = sum(name.startswith("conv") for name in layers.params)
    y = x if position == "net" else relu(layers.norm(x, "norm1"))
    leaves = y if position == "stage" else x
    for i in range(1, count + 1):
        if i > 1:
            y = between(relu(layers.norm(y, f"norm{i}")))
        y = layers.conv(y, f"conv{i}", strides if i == 1 else 1)
    if shortcut == "projection":
        return y + layers.conv(leaves, "shortcut_conv", strides)
    return y + pad_shortcut(leaves, strides, y.shape[-1])


@pytest.mark.parametrize("shortcut", ["projection", "A"])
@pytest.mark.parametrize(
    ("position", "strides"), [("net", 1), ("stage", 2), ("inner", 1)]
)
@pytest.mark.parametrize(
    "block_class",
    [PreActBasicBlock, functools.partial(PreActBottleneckBlock, stride_version="v1")],
    ids=["basic", "bottleneck"],
)
def test_preactivation(x, block_class, position, strides, shortcut):
    features = 6 if block_class is PreActBasicBlock else 3
    block = block_class(
        features,
        strides,
        EVALUATING,
        BARE if shortcut == "projection" else shortcuts.ZeroPad(),
        position=position,
    )
    variables = random_variables(block, x)
    layers = Layers(variables)
    assert ("norm1" in layers.params) == (position != "net")
    assert "shortcut_norm" not in layers.params
    assert ("shortcut_conv" in layers.params) == (shortcut == "projection")
    expected = preactivated(layers, x, strides, position, shortcut)
    assert expected.min() < 0  # nothing follows the addition
    assert_close(apply(block, variables, x), expected)


def test_preactivation_of_an_inner_block_keeps_the_identity(x):
    """The point of pre-activation: x itself is added, unactivated."""
    block = PreActBasicBlock(4, 1, EVALUATING, BARE)
    variables = random_variables(block, x)
    variables["params"]["conv2"]["kernel"][:] = 0
    np.testing.assert_array_equal(apply(block, variables, x), x)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("letter", ["A", "B"])
@pytest.mark.parametrize(
    ("block_class", "last_norm"), [(BasicBlock, "norm2"), (BottleneckBlock, "norm3")]
)
def test_a_block_that_adds_nothing_is_the_identity(
    block_class, last_norm, letter, train
):
    """The construction of the introduction: identity layers on top of a net."""
    x = np.random.default_rng(2).uniform(0, 1, (2, 4, 4, 8)).astype(np.float32)
    x[0, 0] = 0
    block = block_class(
        8 // block_class.expansion,
        1,
        shortcut=shortcuts.BY_NAME[letter],
        norm=functools.partial(BatchNorm, use_running_average=not train),
    )
    variables = random_variables(block, x)
    variables["params"][last_norm] = {"scale": np.zeros(8), "bias": np.zeros(8)}
    np.testing.assert_array_equal(apply(block, variables, x), x)
    np.testing.assert_array_equal(apply(block, variables, -x), np.zeros_like(x))


@pytest.mark.parametrize(
    ("block_class", "features", "letter"),
    [
        (BasicBlock, 64, "A"),
        (functools.partial(BasicBlock, num_convs=3), 64, "B"),
        (functools.partial(BottleneckBlock, groups=2), 16, "B"),
    ],
    ids=["basic", "three convolutions", "bottleneck"],
)
def test_zero_init_last_starts_a_block_as_the_identity(block_class, features, letter):
    x = np.random.default_rng(2).uniform(0, 1, (2, 4, 4, 64)).astype(np.float32)
    fields = {
        "features": features,
        "strides": 1,
        "shortcut": shortcuts.BY_NAME[letter],
    }

    @jax.jit
    def start(x):
        outputs = []
        for norm in (TRAINING, EVALUATING):
            block = block_class(**fields, norm=norm, zero_init_last=True)
            variables = block.init(KEY, x)
            outputs.append(block.apply(variables, x, mutable=["batch_stats"])[0])
        # Not otherwise: ordinary blocks start with their residual function.
        ordinary = block_class(**fields, norm=TRAINING).init_with_output(KEY, x)[0]
        return variables, outputs, ordinary

    variables, outputs, ordinary = start(x)
    for y in outputs:
        np.testing.assert_array_equal(y, x)
    scales = [
        (name, float(leaves["scale"].min()), float(leaves["scale"].max()))
        for name, leaves in sorted(variables["params"].items())
        if name.startswith("norm")
    ]
    assert [low for _, low, _ in scales] == [1] * (len(scales) - 1) + [0]
    assert all(low == high for _, low, high in scales)
    assert np.abs(ordinary - x).max() > 0.1


def test_zero_init_last_starts_a_projecting_block_as_its_shortcut(x):
    block = BasicBlock(6, 2, EVALUATING, zero_init_last=True)
    y, variables = jax.jit(block.init_with_output)(KEY, x)
    layers = Layers(variables)
    expected = layers.norm(layers.conv(x, "shortcut_conv", 2), "shortcut_norm")
    assert_close(y, relu(expected))


def test_a_plain_block_without_its_last_scale_gives_zero():
    x = np.ones((2, 4, 4, 8), np.float32)
    block = BasicBlock(8, 1, EVALUATING, shortcuts.NoShortcut())
    variables = random_variables(block, x)
    variables["params"]["norm2"] = {"scale": np.zeros(8), "bias": np.zeros(8)}
    np.testing.assert_array_equal(apply(block, variables, x), np.zeros_like(x))


class Factor:
    """Stands for a module where only its place is of interest."""

    def __init__(self, factor, name=None):
        self.factor, self.name = factor, name

    def __call__(self, y):
        return y * self.factor


def squash(y):
    """Neither linear nor homogeneous: a factor before it is not one behind it."""
    return np.tanh(y)


def test_dropout_stands_between_the_convolutions(x):
    factors = iter((0.3, -0.7))
    block = BasicBlock(
        6,
        2,
        EVALUATING,
        shortcuts.ZeroPad(),
        activation=jnp.tanh,
        num_convs=3,
        conv=dropout_between(Conv, lambda: Factor(next(factors))),
    )
    variables = random_variables(block.clone(conv=Conv), x)
    layers = Layers(variables)
    y = layers.norm(layers.conv(x, "conv1", 2), "norm1")
    y = layers.norm(layers.conv(0.3 * squash(y), "conv2"), "norm2")
    y = layers.norm(layers.conv(-0.7 * squash(y), "conv3"), "norm3")
    expected = squash(y + pad_shortcut(x, 2, 6))
    ours, _ = block.apply(variables, x, mutable=["batch_stats"])
    assert_close(ours, expected)
    assert next(factors, None) is None


@pytest.mark.parametrize("position", ["net", "stage"])
def test_dropout_of_a_preactivation_block(x, position):
    """Between the convolutions too, never where the block begins."""
    calls = []
    block = PreActBasicBlock(
        6,
        1,
        EVALUATING,
        shortcuts.ZeroPad(),
        position=position,
        conv=dropout_between(Conv, lambda: calls.append(1) or Factor(-0.3)),
    )
    variables = random_variables(block.clone(conv=Conv), x)
    expected = preactivated(
        Layers(variables), x, 1, position, "A", between=lambda y: -0.3 * y
    )
    assert_close(block.apply(variables, x), expected)
    assert len(calls) == 1


class Affine:
    """y times and plus a number: order can be told."""

    def __init__(self, times, plus, name):
        self.times, self.plus, self.name = times, plus, name

    def __call__(self, y, rate=1.0):
        return y * self.times + self.plus * rate


def test_gate_and_stochastic_depth_act_on_the_residual_function_in_this_order(x):
    block = BasicBlock(
        4,
        1,
        EVALUATING,
        squeeze_excite=lambda name: Affine(3, 1, name),
        stochastic_depth=lambda name: Affine(0.5, 10, name),
    )
    variables = random_variables(
        block.clone(squeeze_excite=None, stochastic_depth=None), x
    )
    y = residual_function(Layers(variables), x, 1)
    expected = relu((3 * y + 1) * 0.5 + 10 * 0.25 + x)
    assert_close(block.apply(variables, x, 0.25), expected)


def test_dropout_of_linen_draws_in_training_alone(x):
    def block(train):
        dropout = functools.partial(nn.Dropout, 0.5, deterministic=not train)
        return BasicBlock(4, 1, EVALUATING, conv=dropout_between(Conv, dropout))

    variables = random_variables(block(False), x)
    without = apply(BasicBlock(4, 1, EVALUATING), variables, x)
    np.testing.assert_array_equal(apply(block(False), variables, x), without)
    draws = [
        apply(
            block(True), variables, x, rngs={"dropout": jax.random.fold_in(KEY, seed)}
        )
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 1e-3
    assert np.abs(draws[0] - without).max() > 1e-3


@pytest.mark.parametrize(
    ("block_class", "dilations"),
    [
        (BasicBlock, {"conv1": 2, "conv2": 4}),
        (
            functools.partial(BottleneckBlock, stride_version="v1"),
            {"conv1": 2, "conv2": 4, "conv3": 4},
        ),
        (BottleneckBlock, {"conv1": 2, "conv2": 2, "conv3": 4}),
    ],
    ids=["basic", "v1", "v1.5"],
)
def test_taps_have_the_inputs_spacing_up_to_the_convolution_that_would_stride(
    x, block_class, dilations
):
    block = block_class(4, 1, EVALUATING, shortcuts.ZeroPad(), dilation=(2, 4))
    variables = random_variables(block, x)
    layers, y = Layers(variables), x
    for i, (name, dilation) in enumerate(dilations.items(), start=1):
        y = layers.norm(layers.conv(y, name, dilation=dilation), f"norm{i}")
        y = relu(y) if i < len(dilations) else y
    expected = relu(y + pad_shortcut(x, 1, y.shape[-1]))
    assert_close(apply(block, variables, x), expected)


def test_a_factory_of_convolutions_needs_to_know_only_what_is_asked_of_it(x):
    """A block without stride, dilation and groups asks for none of them."""

    def conv(features, size, name):
        return Conv(features, size, name=name)

    block = BasicBlock(4, 1, EVALUATING, conv=conv)
    variables = random_variables(block, x)
    expected = apply(BasicBlock(4, 1, EVALUATING), variables, x)
    np.testing.assert_array_equal(apply(block, variables, x), expected)


def test_refusals(x):
    block = BottleneckBlock(4, 2, EVALUATING, stride_version="v2")
    with pytest.raises(ValueError, match=r"one of v1, v1\.5, not 'v2'"):
        block.init(KEY, x)
