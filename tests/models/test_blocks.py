"""Convolutions and blocks against NumPy and the paper's equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models import (
    BasicBlock,
    BatchNorm,
    BottleneckBlock,
    Conv,
    shortcuts,
)

EVALUATING = functools.partial(BatchNorm, use_running_average=True)


def convolution(x, kernel, strides):
    """A convolution padded by half the kernel on every side, as nested loops."""
    size, _, _, features = kernel.shape
    half = size // 2
    n, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    y = np.zeros((n, -(-height // strides), -(-width // strides), features))
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            top, left = i * strides, j * strides
            window = padded[:, top : top + size, left : left + size]
            y[:, i, j] = np.tensordot(window, kernel, 3)
    return y


def batch_norm(x, params, stats):
    unit = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    return unit * params["scale"] + params["bias"]


def random_variables(module, x, seed=0):
    """Variables without the zeros and ones behind which a mistake could hide."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return (0.3 * rng.normal(size=leaf.shape)).astype(np.float32)

    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def apply(module, variables, x):
    """The output, convolved in full float32 on every device."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(functools.partial(module.apply, mutable=["batch_stats"]))(
            variables, x
        )[0]


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("sides", [(8, 7), (5, 6)])
def test_convolution_pads_alike_on_every_side(sides, size, strides):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *sides, 3)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 3, 4)).astype(np.float32)
    conv = Conv(4, (size, size), strides)
    y = apply(conv, {"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(y, convolution(x, kernel, strides), atol=1e-4)


def test_convolution_computes_in_its_dtype_from_a_float32_kernel():
    conv = Conv(4, (3, 3), dtype=jnp.bfloat16)
    y, variables = jax.eval_shape(
        conv.init_with_output, jax.random.key(0), jnp.ones((1, 4, 4, 2))
    )
    assert variables["params"]["kernel"].dtype == jnp.float32
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("size", "channels", "features"), [(3, 32, 256), (1, 256, 512), (7, 16, 128)]
)
def test_he_initialisation_with_the_fan_out(size, channels, features):
    x = jnp.zeros((1, 8, 8, channels))
    variables = Conv(features, (size, size)).init(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    variance = 2 / (size * size * features)
    error = np.sqrt(2 / kernel.size)  # standard deviation of a sampled variance
    assert kernel.var() == pytest.approx(variance, rel=5 * error)
    assert abs(kernel.mean()) < 5 * np.sqrt(variance / kernel.size)
    # A normal law, not one cut at two standard deviations (whose kurtosis is 2.4).
    assert (kernel**4).mean() / variance**2 == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize(
    ("strides", "features", "letter"),
    [(1, 4, "A"), (1, 4, "C"), (1, 4, "none"), (2, 6, "A"), (2, 6, "B")],
)
def test_basic_block_is_equation_1(strides, features, letter):
    x = np.random.default_rng(1).normal(size=(2, 5, 5, 4)).astype(np.float32)
    block = BasicBlock(features, strides, EVALUATING, shortcuts.BY_NAME[letter])
    variables = random_variables(block, x)
    params, stats = variables["params"], variables["batch_stats"]

    def layer(x, suffix, strides=1, prefix=""):
        conv, norm = f"{prefix}conv{suffix}", f"{prefix}norm{suffix}"
        y = convolution(x, params[conv]["kernel"], strides)
        return batch_norm(y, params[norm], stats[norm])

    y = layer(np.maximum(layer(x, 1, strides), 0), 2)
    if letter == "A":
        y += np.pad(x[:, ::strides, ::strides], [(0, 0)] * 3 + [(0, features - 4)])
    elif letter != "none":
        y += layer(x, "", strides, "shortcut_")
    ours = apply(block, variables, x)
    np.testing.assert_allclose(ours, np.maximum(y, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stride_version", "strided"), [("v1", 1), ("v1.5", 2)])
def test_bottleneck_strides_where_its_version_says(stride_version, strided):
    x = np.random.default_rng(1).normal(size=(2, 5, 5, 4)).astype(np.float32)
    block = BottleneckBlock(
        3, 2, EVALUATING, shortcuts.ZeroPad(), stride_version=stride_version
    )
    variables = random_variables(block, x)
    params, stats = variables["params"], variables["batch_stats"]
    y = x
    for i in (1, 2, 3):
        kernel = params[f"conv{i}"]["kernel"]
        y = convolution(y, kernel, 2 if i == strided else 1)
        y = batch_norm(y, params[f"norm{i}"], stats[f"norm{i}"])
        y = np.maximum(y, 0) if i < 3 else y
    y += np.pad(x[:, ::2, ::2], [(0, 0)] * 3 + [(0, 8)])
    ours = apply(block, variables, x)
    np.testing.assert_allclose(ours, np.maximum(y, 0), rtol=1e-4, atol=1e-4)


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


def test_a_plain_block_without_its_last_scale_gives_zero():
    x = np.ones((2, 4, 4, 8), np.float32)
    block = BasicBlock(8, 1, EVALUATING, shortcuts.NoShortcut())
    variables = random_variables(block, x)
    variables["params"]["norm2"] = {"scale": np.zeros(8), "bias": np.zeros(8)}
    np.testing.assert_array_equal(apply(block, variables, x), np.zeros_like(x))
