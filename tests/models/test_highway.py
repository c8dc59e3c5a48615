"""Highway nets against their published sizes and a computation in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.analysis.complexity import abstract_variables, count_parameters
from resnet_jax.models import Conv
from resnet_jax.models.highway import HighwayNet
from resnet_jax.models.residual import HighwayLayer

DEEPER = {"widths": (32, 48, 64), "highway_layers": (9, 9, 9)}
SMALL = {"widths": (4, 5), "highway_layers": (2, 1), "bottleneck_features": 7}


def convolution(x, params):
    """A convolution of stride 1 with bias, padded by half the kernel."""
    kernel = params["kernel"]
    size = kernel.shape[0]
    half = size // 2
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    y = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            window = padded[:, i : i + size, j : j + size]
            y[:, i, j] = np.tensordot(window, kernel, 3)
    return y + params["bias"]


def relu(x):
    return np.maximum(x, 0)


def highway_layer(x, params):
    t = 1 / (1 + np.exp(-convolution(x, params["gate"])))
    return relu(convolution(x, params["transform"])) * t + x * (1 - t)


def max_pool(x):
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


def random_variables(module, image_shape, dtype=np.float64):
    """Variables without the zeros behind which a mistake could hide."""
    rng = np.random.default_rng(0)
    x = jnp.zeros((1, *image_shape))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(dtype), shapes
    )


@pytest.fixture
def images():
    return np.random.default_rng(1).normal(size=(2, 7, 8, 3))


def dropouts(model, images):
    """The shapes on which dropout is active in a training pass."""
    seen = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout) and not context.module.deterministic:
            seen.append((context.module.rate, args[0].shape))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(
            lambda keys: model.init(keys, images, train=True),
            {"params": jax.random.key(0), "dropout": jax.random.key(1)},
        )
    return seen


@pytest.mark.parametrize(
    ("options", "depth", "parameters", "published"),
    [({}, 19, 2_256_838, 2.3e6), (DEEPER, 32, 1_255_270, 1.25e6)],
)
def test_parameters_are_those_of_the_formula_and_the_paper(
    options, depth, parameters, published
):
    model = HighwayNet(**options)
    params = abstract_variables(model, (32, 32, 3))["params"]
    count, layers, before = 0, 0, 3
    for width, highway_layers in zip(model.widths, model.highway_layers):
        count += (9 * before + 1) * width
        count += highway_layers * 2 * (9 * width + 1) * width
        layers += 1 + highway_layers
        before = width
    count += (before + 1) * 100 + (100 + 1) * 10
    assert layers + 2 == depth
    assert count_parameters(params) == count == parameters
    assert count == pytest.approx(published, rel=0.02 if depth == 19 else 0.01)


def test_the_names_of_the_variables():
    variables = abstract_variables(HighwayNet(), (32, 32, 3))
    assert set(variables) == {"params"}
    params = jax.tree.map(lambda leaf: leaf.shape, variables["params"])
    assert set(params) == {"stage1", "stage2", "stage3", "bottleneck", "head"}
    assert set(params["stage1"]) == {"conv"} | {f"highway{i}" for i in range(1, 5)}
    conv = {"kernel": (3, 3, 80, 80), "bias": (80,)}
    assert params["stage2"]["highway5"] == {"transform": conv, "gate": conv}
    assert params["stage3"]["conv"] == {"kernel": (3, 3, 80, 128), "bias": (128,)}
    assert params["bottleneck"] == {"kernel": (1, 1, 128, 100), "bias": (100,)}
    assert params["head"] == {"kernel": (100, 10), "bias": (10,)}


def initial_params(**options):
    model = HighwayNet(widths=(4,), highway_layers=(1,), **options)
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]


def test_initial_kernels_are_glorots_and_the_gates_alone_have_a_bias():
    def check(path, leaf):
        names = [key.key for key in path]
        if names[-1] == "bias":
            assert (leaf == (-2 if names[-2] == "gate" else 0)).all(), names
        else:
            bound = np.sqrt(6 / (np.prod(leaf.shape[:-2]) * sum(leaf.shape[-2:])))
            assert 0.7 * bound < np.abs(leaf).max() <= bound, names

    jax.tree_util.tree_map_with_path(check, initial_params())


def test_the_initial_values_are_options():
    zeros = nn.initializers.zeros
    params = initial_params(gate_bias=-4.0, kernel_init=zeros)
    gate = params["stage1"]["highway1"].pop("gate")
    assert (gate["bias"] == -4).all()
    assert not any(leaf.any() for leaf in jax.tree.leaves([params, gate["kernel"]]))


def test_a_highway_layer_is_its_equation(images):
    conv = functools.partial(Conv, kernel_size=(3, 3), use_bias=True)
    variables = random_variables(HighwayLayer(conv), images.shape[1:])
    layer = HighwayLayer(functools.partial(conv, dtype=jnp.float64))
    with jax.enable_x64(True):
        y = layer.apply(variables, images)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, highway_layer(images, variables["params"]), 1e-12)


def features_in_numpy(images, params):
    x = relu(convolution(images, params["stage1"]["conv"]))
    x = highway_layer(x, params["stage1"]["highway1"])
    x = max_pool(highway_layer(x, params["stage1"]["highway2"]))
    x = relu(convolution(x, params["stage2"]["conv"]))
    x = highway_layer(x, params["stage2"]["highway1"])
    return relu(convolution(x, params["bottleneck"])).mean((1, 2))


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)]
)
@pytest.mark.parametrize("num_classes", [10, None])
def test_a_whole_net_is_its_layers(images, num_classes, precision, tolerance):
    options = SMALL | {"num_classes": num_classes}
    variables = random_variables(HighwayNet(**options), images.shape[1:], precision)
    assert ("head" in variables["params"]) == (num_classes is not None)
    model = HighwayNet(**options, dtype=precision)
    with (
        jax.enable_x64(precision == "float64"),
        jax.default_matmul_precision("highest"),
    ):
        y = jax.jit(model.apply)(variables, images.astype(precision))
    params = jax.tree.map(np.float64, variables["params"])
    expected = features_in_numpy(images, params)
    if num_classes is not None:
        expected = expected @ params["head"]["kernel"] + params["head"]["bias"]
    assert y.dtype == precision
    np.testing.assert_allclose(y, expected, tolerance, tolerance * expected.max())


def test_closed_gates_make_every_highway_layer_the_identity(images):
    model = HighwayNet(**SMALL)
    params = random_variables(model, images.shape[1:], np.float32)["params"]
    kept = dict(params)
    for stage in ("stage1", "stage2"):
        kept[stage] = {"conv": params[stage]["conv"]}
        for name in params[stage].keys() - {"conv"}:
            params[stage][name]["gate"]["bias"] -= 1e4
    without = HighwayNet(**SMALL | {"highway_layers": (0, 0)})
    expected = jax.jit(without.apply)({"params": kept}, images)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_array_equal(
        jax.jit(model.apply)({"params": params}, images), expected
    )


def test_dropout_is_on_the_images_behind_pools_and_before_the_classifier():
    model = HighwayNet(dropout_rate=0.2)
    shapes = [(2, 32, 32, 3), (2, 16, 16, 32), (2, 8, 8, 80), (2, 100)]
    assert dropouts(model, jnp.zeros(shapes[0])) == [(0.2, shape) for shape in shapes]


def test_dropout_is_active_in_training_alone(images):
    with_dropout = HighwayNet(**SMALL, dropout_rate=0.2)
    variables = random_variables(with_dropout, images.shape[1:], np.float32)
    evaluated = with_dropout.apply(variables, images)
    trained = functools.partial(with_dropout.apply, variables, images, train=True)
    first, again, second = (
        trained(rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second)
    assert not np.allclose(first, evaluated)
    without = HighwayNet(**SMALL)
    for train in (False, True):
        np.testing.assert_array_equal(
            without.apply(variables, images, train=train), evaluated
        )


def test_bfloat16_keeps_float32_parameters_and_logits(images):
    variables = random_variables(HighwayNet(**SMALL), images.shape[1:], np.float32)
    model = HighwayNet(**SMALL, dtype=jnp.bfloat16)
    logits, captured = model.apply(variables, images, capture_intermediates=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}
    assert logits.dtype == np.float32
    maps = [captured["intermediates"][name] for name in ("stage1", "stage2")]
    maps.append(captured["intermediates"]["bottleneck"])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(maps)} == {"bfloat16"}
    single = HighwayNet(**SMALL).apply(variables, images)
    np.testing.assert_allclose(logits, single, atol=0.05 * np.abs(single).max())


def test_unequal_numbers_of_stages():
    model = HighwayNet(widths=(4, 4, 4), highway_layers=(1, 1))
    with pytest.raises(ValueError, match="3 widths but 2 highway_layers"):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_images_of_which_nothing_remains():
    with pytest.raises(ValueError, match=r"4x3 pixels.*2 poolings.*4x4"):
        HighwayNet().init(jax.random.key(0), jnp.zeros((1, 4, 3, 3)))
    assert abstract_variables(HighwayNet(), (4, 4, 3))["params"]


def test_features_are_the_stages_outputs_before_their_poolings():
    model = HighwayNet(widths=(4, 6), highway_layers=(1, 2))
    images = jnp.ones((2, 8, 12, 3))
    variables = model.init(jax.random.key(0), images)
    maps = model.apply(variables, images, method="features")
    assert [(m.name, m.stride, m.shape) for m in maps] == [
        ("C1", 1, (2, 8, 12, 4)),
        ("C2", 2, (2, 4, 6, 6)),
    ]
    # What follows the last map: the 1x1 convolution with ReLU, and the mean.
    layer = variables["params"]["bottleneck"]
    expected = np.maximum(
        np.asarray(maps[-1].array) @ layer["kernel"][0, 0] + layer["bias"], 0
    ).mean((1, 2))
    pooled = model.clone(num_classes=None).apply(variables, images)
    np.testing.assert_allclose(pooled, expected, rtol=1e-5)
