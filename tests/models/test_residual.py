"""Residual and highway connections around any module, against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.models import BatchNorm
from resnet_jax.models.residual import Highway, Residual


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def shapes_of(module, x, *args, **kwargs):
    variables = jax.eval_shape(
        lambda key: module.init(key, x, *args, **kwargs), jax.random.key(0)
    )
    return jax.tree.map(lambda leaf: leaf.shape, variables.get("params", {}))


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("double")
def test_the_gradients_of_one_layer_are_those_of_the_closed_form(rng):
    """Of <g, x W + b + x>: W's is x^T g, b's the sum of g, and x's is g W^T + g."""
    x, g = rng.normal(size=(2, 5, 4))
    params = {"layer": {"kernel": rng.normal(size=(4, 4)), "bias": rng.normal(size=4)}}
    residual = Residual(nn.Dense(4))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, x):
        y = residual.apply({"params": params}, x)
        return jnp.vdot(y, g), y

    (_, y), (params_gradient, x_gradient) = loss(params, x)
    kernel, bias = params["layer"]["kernel"], params["layer"]["bias"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-13)
    assert y.dtype == np.float64
    close(y, x @ kernel + bias + x)
    close(params_gradient["layer"]["kernel"], x.T @ g)
    close(params_gradient["layer"]["bias"], g.sum(0))
    close(x_gradient, g @ kernel.T + g)


@pytest.mark.usefixtures("double")
def test_the_gradients_of_a_projection_are_those_of_the_closed_form(rng):
    x, g = rng.normal(size=(5, 4)), rng.normal(size=(5, 3))
    residual = Residual(nn.Dense(3, use_bias=False))
    kernel, projection = rng.normal(size=(2, 4, 3))
    params = {"layer": {"kernel": kernel}, "shortcut": {"kernel": projection}}

    def loss(params, x):
        return jnp.vdot(residual.apply({"params": params}, x), g)

    params_gradient, x_gradient = jax.grad(loss, argnums=(0, 1))(params, x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-13)
    close(loss(params, x), np.vdot(x @ (kernel + projection), g))
    close(params_gradient["layer"]["kernel"], x.T @ g)
    close(params_gradient["shortcut"]["kernel"], x.T @ g)
    close(x_gradient, g @ (kernel + projection).T)


def test_layers_that_give_zero_make_a_deep_stack_the_identity(rng):
    zeros = nn.initializers.zeros
    stack = nn.Sequential([Residual(nn.Dense(4, kernel_init=zeros)) for _ in range(50)])
    x, g = rng.normal(size=(2, 3, 4)).astype(np.float32)
    variables = stack.init(jax.random.key(0), x)
    y, pull_back = jax.vjp(lambda x: stack.apply(variables, x), x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(pull_back(g)[0], g)


@pytest.mark.parametrize(
    ("layer", "shape", "strides"),
    [
        (nn.Dense(6), (4,), ()),
        (nn.Dense(6), (2, 4), (1,)),
        (nn.Conv(6, (3,), strides=2), (2, 7, 4), (1, 2)),
        (nn.Conv(6, (3, 3)), (2, 5, 6, 4), (1, 1, 1)),
        (nn.Conv(4, (3, 3), strides=2), (2, 8, 7, 4), (1, 2, 2)),
        (nn.Conv(6, (3, 3), strides=(1, 3)), (2, 5, 8, 4), (1, 1, 3)),
        (nn.Conv(6, (3, 3, 3), strides=(2, 1, 4)), (2, 3, 2, 13, 4), (1, 2, 1, 4)),
        (lambda x: jnp.ones((2, 1, 3)), (2, 9, 4), (1, 9)),
    ],
)
def test_a_changed_shape_is_projected_with_the_stride_of_each_axis(
    rng, layer, shape, strides
):
    x = rng.normal(size=shape).astype(np.float32)
    y, variables = Residual(layer).init_with_output(jax.random.key(0), x)
    params = variables["params"]
    function, names = layer, {"shortcut"}
    if isinstance(layer, nn.Module):
        function = functools.partial(layer.apply, {"params": params["layer"]})
        names = {"layer", "shortcut"}
    assert set(params) == names
    assert set(params["shortcut"]) == {"kernel"}
    kept = x[tuple(slice(None, None, stride) for stride in strides)]
    expected = np.asarray(function(x)) + kept @ np.asarray(params["shortcut"]["kernel"])
    assert params["shortcut"]["kernel"].shape == (shape[-1], expected.shape[-1])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dense(4), (2, 4)),
        (nn.LayerNorm(), (2, 3, 4)),
        (nn.Conv(4, (3, 3)), (2, 5, 6, 4)),
        (nn.Sequential([nn.Dense(9), nn.relu, nn.Dense(4)]), (2, 4)),
        (jnp.sin, (2, 4)),
        (jnp.sum, ()),
    ],
)
def test_the_identity_where_the_shape_stays(rng, layer, shape):
    x = rng.normal(size=shape).astype(np.float32)
    y, variables = Residual(layer).init_with_output(jax.random.key(0), x)
    function, expected = layer, {}
    if isinstance(layer, nn.Module):
        inner = variables["params"]["layer"]
        function = functools.partial(layer.apply, {"params": inner})
        expected = {"params": {"layer": inner}}
    assert variables == expected
    np.testing.assert_allclose(y, function(x) + x, rtol=1e-6, atol=1e-6)


def test_he_initialisation_of_the_projection():
    x = jnp.zeros((1, 300))
    params = Residual(nn.Dense(400)).init(jax.random.key(0), x)["params"]
    kernel = np.asarray(params["shortcut"]["kernel"], np.float64)
    assert kernel.var() == pytest.approx(2 / 400, rel=0.03)


def test_the_norm_is_of_the_residual_function_and_the_activation_of_the_sum(rng):
    x = rng.normal(size=(2, 4)).astype(np.float32)
    residual = Residual(
        nn.Dense(3),
        norm=functools.partial(BatchNorm, use_running_average=True),
        activation=nn.relu,
    )
    params = {
        "layer": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)},
        "norm": {"scale": rng.uniform(0.5, 1.5, 3), "bias": rng.normal(size=3)},
        "shortcut": {"kernel": rng.normal(size=(4, 3))},
    }
    stats = {"norm": {"mean": rng.normal(size=3), "var": rng.uniform(0.5, 1.5, 3)}}
    assert shapes_of(residual, x) == jax.tree.map(np.shape, params)
    y = residual.apply({"params": params, "batch_stats": stats}, x)
    f = x @ params["layer"]["kernel"] + params["layer"]["bias"]
    unit = (f - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5)
    total = unit * params["norm"]["scale"] + params["norm"]["bias"]
    total = total + x @ params["shortcut"]["kernel"]
    assert (total < 0).any()
    np.testing.assert_allclose(y, np.maximum(total, 0), rtol=1e-5, atol=1e-5)


def test_a_norm_in_training_updates_its_statistics(rng):
    x = rng.normal(size=(8, 4)).astype(np.float32)
    residual = Residual(
        nn.Dense(4), norm=functools.partial(BatchNorm, use_running_average=False)
    )
    variables = residual.init(jax.random.key(0), x)
    _, updated = residual.apply(variables, x, mutable=["batch_stats"])
    f = nn.Dense(4).apply({"params": variables["params"]["layer"]}, x)
    mean = updated["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * f.mean(0), rtol=1e-4, atol=1e-6)


def test_further_arguments_go_to_the_layer(rng):
    x = rng.normal(size=(2, 4)).astype(np.float32)
    residual = Residual(nn.Dropout(0.5))
    np.testing.assert_array_equal(residual.apply({}, x, deterministic=True), 2 * x)
    rngs = {"dropout": jax.random.key(0)}
    y = np.asarray(residual.apply({}, x, False, rngs=rngs))
    assert np.isclose(y, x).any()
    assert np.isclose(y, 3 * x).any()
    assert (np.isclose(y, x) | np.isclose(y, 3 * x)).all()


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Residual(nn.Dense(5))(x)
        x = Residual(nn.Dense(6, parent=None), name="second")(x)
        return Highway(nn.Dense(6), nn.Dense(6, name="gate"))(x)


def test_the_names_of_variables_inside_a_compact_method():
    x = jnp.ones((2, 3))
    assert shapes_of(Net(), x) == {
        "Dense_0": {"kernel": (3, 5), "bias": (5,)},
        "Residual_0": {"shortcut": {"kernel": (3, 5)}},
        "second": {
            "layer": {"kernel": (5, 6), "bias": (6,)},
            "shortcut": {"kernel": (5, 6)},
        },
        "Dense_1": {"kernel": (6, 6), "bias": (6,)},
        "gate": {"kernel": (6, 6), "bias": (6,)},
    }
    variables = Net().init(jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda v: Net().apply(v, x).sum()))(variables)
    norms = [np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)]
    assert min(norms) > 0


def test_the_names_of_variables_below_a_sequence():
    layer = nn.Sequential([nn.Dense(9), nn.relu, nn.Dense(4)])
    assert shapes_of(Residual(layer), jnp.ones((2, 3))) == {
        "layer": {
            "layers_0": {"kernel": (3, 9), "bias": (9,)},
            "layers_2": {"kernel": (9, 4), "bias": (4,)},
        },
        "shortcut": {"kernel": (3, 4)},
    }


@pytest.mark.parametrize(
    ("shape", "new_shape", "message"),
    [
        ((2, 8, 3), (2, 5, 3), r"\(2, 8, 3\) into \(2, 5, 3\).*axis 1 from 8 to 5"),
        ((2, 8, 9, 3), (2, 4, 7, 3), r"axis 2 from 9 to 7"),
        ((2, 8, 3), (2, 9, 3), r"axis 1 from 8 to 9"),
        ((2, 8, 3), (2, 0, 3), r"axis 1 from 8 to 0"),
        ((2, 0, 3), (2, 8, 3), r"axis 1 from 0 to 8"),
        ((2, 8, 3), (2, 24), r"\(2, 8, 3\) into \(2, 24\).*number of axes"),
        ((4, 3), (2, 3), r"\(4, 3\) into \(2, 3\).*the batch"),
        ((3,), (), r"\(3,\) into \(\).*number of axes"),
    ],
)
def test_shapes_that_no_projection_reaches(shape, new_shape, message):
    residual = Residual(lambda x: jnp.zeros(new_shape))
    with pytest.raises(ValueError, match=message):
        residual.init(jax.random.key(0), jnp.zeros(shape))


def test_without_projection_the_shape_must_stay():
    x = jnp.ones((2, 4))
    assert set(shapes_of(Residual(nn.Dense(4), project=False), x)) == {"layer"}
    with pytest.raises(ValueError, match=r"\(2, 4\) into \(2, 5\).*project=False"):
        Residual(nn.Dense(5), project=False).init(jax.random.key(0), x)


@pytest.mark.parametrize(
    ("x_dtype", "layer_dtype", "dtype", "expected"),
    [
        ("bfloat16", "bfloat16", None, "bfloat16"),
        ("float32", "bfloat16", None, "float32"),
        ("float32", None, "bfloat16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("features", [4, 5])
def test_the_dtype_of_the_sum(x_dtype, layer_dtype, dtype, expected, features):
    x = jnp.ones((2, 4), x_dtype)
    residual = Residual(nn.Dense(features, dtype=layer_dtype), dtype=dtype)
    y, variables = residual.init_with_output(jax.random.key(0), x)
    assert y.dtype == expected
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}


@pytest.mark.usefixtures("double")
def test_highway_is_its_equation(rng):
    x = rng.normal(size=(5, 4))
    names = ("layer", "gate")
    params = {
        name: {"kernel": rng.normal(size=(4, 4)), "bias": rng.normal(size=4)}
        for name in names
    }
    y = Highway(nn.Dense(4), nn.Dense(4)).apply({"params": params}, x)
    h, z = (x @ params[name]["kernel"] + params[name]["bias"] for name in names)
    t = 1 / (1 + np.exp(-z))
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, h * t + x * (1 - t), rtol=1e-13)


@pytest.mark.parametrize("bias", [-np.inf, np.inf])
def test_a_saturated_gate_carries_all_or_transforms_all(rng, bias):
    x = rng.normal(size=(5, 4)).astype(np.float32)
    gate = nn.Dense(4, bias_init=nn.initializers.constant(bias))
    y, variables = Highway(nn.Dense(4), gate).init_with_output(jax.random.key(0), x)
    assert set(variables["params"]) == {"layer", "gate"}
    h = nn.Dense(4).apply({"params": variables["params"]["layer"]}, x)
    np.testing.assert_array_equal(y, x if bias < 0 else h)


def test_further_arguments_go_to_the_highway_layer_alone(rng):
    x = rng.normal(size=(5, 4)).astype(np.float32)
    highway = Highway(lambda x, factor, add: factor * x + add, jnp.zeros_like)
    y = highway.apply({}, x, 3.0, add=1.0)
    np.testing.assert_allclose(y, 0.5 * (3 * x + 1) + 0.5 * x, rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "gate", "name"),
    [(nn.Dense(5), nn.Dense(4), "layer"), (nn.Dense(4), nn.Dense(1), "gate")],
)
def test_highways_keep_the_shape(layer, gate, name):
    features = {"layer": 5, "gate": 1}[name]
    message = rf"highway's {name} turns the shape \(2, 4\) into \(2, {features}\)"
    with pytest.raises(ValueError, match=message):
        Highway(layer, gate).init(jax.random.key(0), jnp.ones((2, 4)))
