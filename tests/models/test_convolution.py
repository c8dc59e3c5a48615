"""Convolutions against nested loops, and their initialisation against its law."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.models import Conv, create_model
from resnet_jax.models.conv import (
    ALGORITHMS,
    convolve,
    is_packable,
    loop_algorithm,
    packed_convolve,
)
from resnet_jax.models.platforms import compiling_for
from tests.models.reference import (
    KEY,
    apply,
    assert_trees_close,
    convolution,
    double_precision,
    torch_or_skip,
)


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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("size", "strides", "dilation", "groups"),
    [(3, 1, 2, 1), (3, 2, 3, 1), (3, 2, 1, 2), (3, 1, 2, 4), (1, 2, 1, 4)],
)
def test_dilation_and_groups(size, strides, dilation, groups, algorithm):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 6, 8)).astype(np.float32)
    conv = Conv(12, (size, size), strides, dilation, groups, algorithm=algorithm)
    kernel = rng.normal(size=(size, size, 8 // groups, 12)).astype(np.float32)
    shapes = jax.eval_shape(conv.init, KEY, x)["params"]
    assert jax.tree.map(np.shape, shapes) == {"kernel": kernel.shape}
    y = apply(conv, {"params": {"kernel": kernel}}, x)
    expected = convolution(x, kernel, strides, dilation, groups)
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_a_bias_is_added_to_every_pixel():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    kernel, bias = np.ones((1, 1, 3, 2), np.float32), np.array([3, -5], np.float32)
    conv = Conv(2, (1, 1), use_bias=True)
    y = apply(conv, {"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(y, x.sum(-1, keepdims=True) + bias, atol=1e-5)


def test_convolution_computes_in_its_dtype_from_a_float32_kernel():
    conv = Conv(4, (3, 3), dtype=jnp.bfloat16)
    y, variables = jax.eval_shape(conv.init_with_output, KEY, jnp.ones((1, 4, 4, 2)))
    assert variables["params"]["kernel"].dtype == jnp.float32
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("algorithm", "channels", "size", "strides", "dilation"),
    [
        ("packed", 4, 3, 2, 2),
        ("packed", 4, 1, 2, 1),
        ("products", 32, 3, 1, 1),
        ("products", 32, 3, 1, 2),
        ("products", 4, 3, 2, 2),
        ("products", 4, 1, 2, 1),
        ("patches", 4, 3, 1, 2),
        ("patches", 4, 3, 2, 1),
    ],
)
def test_every_algorithm_has_the_gradients_of_the_definition(
    algorithm, channels, size, strides, dilation
):
    """<dy, conv(x, k)> is linear in x and in k: its gradients are sums over pixels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 6, channels))
    kernel = rng.normal(size=(size, size, channels, 3))
    dy = rng.normal(size=(2, -(-5 // strides), -(-6 // strides), 3))
    reach = size // 2 * dilation
    frame = ((0, 0), (reach, reach), (reach, reach), (0, 0))
    padded, dx = np.pad(x, frame), np.pad(np.zeros_like(x), frame)
    dkernel = np.zeros_like(kernel)
    for i, j in np.ndindex(dy.shape[1:3]):
        for p, q in np.ndindex(size, size):
            row, column = i * strides + p * dilation, j * strides + q * dilation
            dkernel[p, q] += padded[:, row, column].T @ dy[:, i, j]
            dx[:, row, column] += dy[:, i, j] @ kernel[p, q].T
    dx = dx[:, reach : reach + 5, reach : reach + 6]

    conv = functools.partial(
        convolve, strides=strides, dilation=dilation, algorithm=algorithm
    )
    with double_precision():
        gradients = jax.jit(
            jax.grad(lambda x, k: jnp.vdot(conv(x, k), dy), argnums=(0, 1))
        )(x, kernel)
        _, tangent = jax.jit(functools.partial(jax.jvp, conv))(
            (x, kernel), (dx, dkernel)
        )
    np.testing.assert_allclose(gradients[0], dx, atol=1e-11)
    np.testing.assert_allclose(gradients[1], dkernel, atol=1e-11)
    # The derivative along the gradient is the gradient's squared length, over dy.
    squared = np.vdot(dx, dx) + np.vdot(dkernel, dkernel)
    assert np.vdot(tangent, dy) == pytest.approx(squared, rel=1e-11)


@pytest.mark.parametrize(
    ("channels", "size", "strides"),
    [
        (3, 7, 2),
        (1, 3, 2),
        (3, 3, 1),
        (16, 3, 1),
        (4, 5, 1),
        (4, 3, 4),
        (4, 1, 1),
        (4, 1, 2),
    ],
)
def test_packed_pixels_change_nothing(channels, size, strides):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 12, channels))
    kernel = rng.normal(size=(size, size, channels, 5))
    dy = rng.normal(size=(2, 8 // strides, 12 // strides, 5))

    def results(function):
        y, pull = jax.vjp(function, x, kernel)
        return y, *pull(dy)

    with double_precision():
        expected = results(
            lambda x, k: convolve(x, k, strides, algorithm="xla"),
        )
        found = results(lambda x, k: packed_convolve(x, k, strides))
        assert_trees_close(found, expected, 1e-13)


def packed_layers(name, side):
    """The paths of a bfloat16 net's convolutions that are packed."""
    found = []

    def record(call, args, kwargs, context):
        module = context.module
        if isinstance(module, Conv) and context.method_name == "__call__":
            x = args[0]
            shape = (*module.kernel_size, x.shape[-1], module.features)
            kernel = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            if is_packable(x.astype(jnp.bfloat16), kernel, module.strides):
                found.append("/".join(module.path))
        return call(*args, **kwargs)

    net = create_model(name, dtype=jnp.bfloat16)
    with nn.intercept_methods(record):
        jax.eval_shape(net.init, KEY, jnp.zeros((1, side, side, 3)))
    return found


def test_a_gpu_packs_the_stem_and_the_layers_of_16_channels():
    assert packed_layers("resnet50", 224) == ["stem/conv"]
    assert packed_layers("resnet50", 230) == []  # 4 does not divide it
    assert packed_layers("resnet50d", 224) == ["stem/conv1"]
    blocks = [f"stage1/block{b}/conv{c}" for b in (1, 2, 3) for c in (1, 2)]
    assert packed_layers("cifar_resnet20", 32) == ["stem/conv", *blocks]


def test_packing_is_for_narrow_types():
    x, kernel = jnp.ones((1, 24, 24, 3)), jnp.ones((3, 3, 3, 16))
    for dtype in (jnp.float32, jnp.int32):
        assert not is_packable(x.astype(dtype), kernel.astype(dtype), 1)
    x = x.astype(jnp.bfloat16)
    assert not is_packable(x, kernel, 1)
    kernel = kernel.astype(jnp.bfloat16)
    assert is_packable(x, kernel, 1)
    assert not is_packable(x, kernel, 3)
    assert not is_packable(x, kernel[:2], 1)


def test_a_packed_layer_rounds_like_others():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 16, 16, 16)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 16, 16)).astype(np.float32)

    def results(algorithm, dtype):
        conv = Conv(16, (3, 3), dtype=dtype, algorithm=algorithm)

        def loss(kernel, x):
            y = conv.apply({"params": {"kernel": kernel}}, x)
            return jnp.square(y.astype(jnp.float32)).mean()

        return jax.jit(jax.value_and_grad(loss))(kernel, x)

    expected = results("xla", jnp.float32)
    for algorithm in ("xla", "packed"):
        assert_trees_close(results(algorithm, jnp.bfloat16), expected, 1e-2)


@pytest.mark.parametrize(
    ("platform", "algorithm"), [("cpu", "products"), ("gpu", "packed"), ("tpu", "xla")]
)
def test_auto_follows_the_platform(platform, algorithm):
    x = jnp.ones((2, 8, 8, 16), jnp.bfloat16)

    def program(algorithm):
        gradient = jax.grad(lambda k: convolve(x, k, algorithm=algorithm).sum())
        return str(jax.make_jaxpr(gradient)(jnp.ones((3, 3, 16, 16), jnp.bfloat16)))

    with compiling_for(platform):
        assert program("auto") == program(algorithm)
    others = {program(name) for name in ("xla", "packed")}
    assert len(others) == 2


def test_an_unknown_algorithm_is_refused():
    names = ", ".join(ALGORITHMS)
    match = rf"one of {names}, not 'fft'$"
    with pytest.raises(ValueError, match=match):
        convolve(np.ones((1, 3, 3, 1)), np.ones((1, 1, 1, 1)), algorithm="fft")


def test_an_unknown_platform_is_refused():
    with (
        pytest.raises(ValueError, match="is one of cpu, gpu, tpu, not 'cuda'"),
        compiling_for("cuda"),
    ):
        pass


@pytest.mark.parametrize(
    ("platform", "algorithm"), [("cpu", "patches"), ("gpu", "auto"), ("tpu", "auto")]
)
def test_auto_is_another_algorithm_in_a_loop_on_the_cpu(platform, algorithm):
    with compiling_for(platform):
        assert loop_algorithm("auto") == algorithm
        for chosen in ("xla", "products", "patches"):
            assert loop_algorithm(chosen) == chosen


def fresh_kernel(channels, features, size, groups=1):
    x = jnp.zeros((1, 8, 8, channels))
    conv = Conv(features, (size, size), groups=groups)
    kernel = jax.jit(conv.init)(KEY, x)["params"]["kernel"]
    return np.asarray(kernel, np.float64)


@pytest.mark.parametrize(
    ("size", "channels", "features"), [(3, 32, 256), (1, 256, 512), (7, 16, 128)]
)
def test_he_initialisation_with_the_fan_out(size, channels, features):
    kernel = fresh_kernel(channels, features, size)
    variance = 2 / (size * size * features)
    error = np.sqrt(2 / kernel.size)  # standard deviation of a sampled variance
    assert kernel.var() == pytest.approx(variance, rel=5 * error)
    assert abs(kernel.mean()) < 5 * np.sqrt(variance / kernel.size)
    # A normal law, not one cut at two standard deviations (whose kurtosis is 2.4).
    assert (kernel**4).mean() / variance**2 == pytest.approx(3, rel=0.05)


def test_he_initialisation_of_a_grouped_convolution_is_torchs():
    """The fan-out of all features, though a pixel reaches a group of them only."""
    torch = torch_or_skip()
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(256, 256, 3, groups=8, bias=False)
    torch.nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    kernel = fresh_kernel(256, 256, 3, groups=8)
    assert kernel.size == conv.weight.numel()
    error = np.sqrt(2 / kernel.size)
    theirs = conv.weight.detach().double().var().item()
    assert kernel.var() == pytest.approx(theirs, rel=7 * error)
    assert kernel.var() == pytest.approx(2 / (9 * 256), rel=5 * error)
