"""Dense plain and highway nets against closed forms and a computation in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.analysis.complexity import abstract_variables, count_parameters
from resnet_jax.models import HighwayMLP, PlainMLP, create_model
from tests.models.reference import KEY, relu

NETS = {"plain": PlainMLP, "highway": HighwayMLP}


@pytest.fixture
def images():
    return np.random.default_rng(1).normal(size=(3, 4, 5, 2)).astype(np.float32)


def random_variables(module, x):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), shapes
    )


def dense(x, params):
    return x @ params["kernel"] + params["bias"]


def in_numpy(images, params, depth):
    """Of either kind: a layer with a gate is a highway layer."""
    x = relu(dense(images.reshape(len(images), -1), params["layer1"]))
    for number in range(2, depth + 1):
        layer = params[f"layer{number}"]
        if "gate" in layer:
            t = 1 / (1 + np.exp(-dense(x, layer["gate"])))
            x = relu(dense(x, layer["transform"])) * t + x * (1 - t)
        else:
            x = relu(dense(x, layer))
    return x


@pytest.mark.parametrize("num_classes", [4, None])
@pytest.mark.parametrize("kind", NETS)
def test_a_whole_net_is_its_layers(images, kind, num_classes):
    model = NETS[kind](depth=4, width=6, num_classes=num_classes)
    variables = random_variables(model, images)
    params = jax.tree.map(np.float64, variables["params"])
    expected = in_numpy(images, params, 4)
    if num_classes is not None:
        expected = dense(expected, params["head"])
    with jax.default_matmul_precision("highest"):
        y = jax.jit(model.apply)(variables, images)
    assert np.ptp(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [10, 20, 50, 100])
def test_parameters_by_the_closed_form(depth):
    """784 pixels; d - 1 layers of w (w + 1), twice for gates; w to 10 classes."""

    def count(name):
        params = abstract_variables(create_model(name), (28, 28, 1))["params"]
        assert set(params) == {f"layer{i + 1}" for i in range(depth)} | {"head"}
        return count_parameters(params)

    highway, plain = count(f"mnist_highway{depth}"), count(f"mnist_plain{depth}")
    assert highway == 785 * 50 + (depth - 1) * 2 * 51 * 50 + 51 * 10
    assert plain == 785 * 71 + (depth - 1) * 72 * 71 + 72 * 10


def test_71_plain_units_have_the_parameters_of_50_highway_units():
    """Srivastava et al. 2015: a layer of either kind has the same number, nearly."""
    highway = 2 * (50 * 50 + 50)
    errors = {width: abs(width * width + width - highway) for width in range(1, 200)}
    assert min(errors, key=errors.get) == 71 == PlainMLP().width
    assert HighwayMLP().width == 50


def test_closed_gates_leave_the_first_layer(images):
    model = HighwayMLP(depth=5, width=6)
    params = random_variables(model, images)["params"]
    for number in range(2, 6):
        params[f"layer{number}"]["gate"]["bias"] -= 1e4
    shallow = {name: params[name] for name in ("layer1", "head")}
    np.testing.assert_array_equal(
        model.apply({"params": params}, images),
        PlainMLP(depth=1, width=6).apply({"params": shallow}, images),
    )


def test_initial_values(images):
    model = HighwayMLP(depth=2, width=300, gate_bias=-3.0)
    params = jax.jit(model.init)(KEY, images)["params"]
    layer = params["layer2"]
    np.testing.assert_array_equal(layer["gate"]["bias"], -3)
    for dense in (params["layer1"], layer["transform"], params["head"]):
        assert not np.any(dense["bias"])
    fan_ins = {"layer1": 40, "head": 300}
    for name, fan_in in fan_ins.items():
        std = np.asarray(params[name]["kernel"]).std()
        assert std == pytest.approx(np.sqrt(2 / fan_in), rel=0.05), name


def test_bfloat16_keeps_float32_parameters_and_logits(images):
    for kind in NETS.values():
        model = kind(depth=3, width=6, dtype=jnp.bfloat16)
        variables = random_variables(model, images)
        logits, seen = model.apply(variables, images, capture_intermediates=True)
        assert logits.dtype == np.float32
        layer = seen["intermediates"]["layer1"]["__call__"][0]
        assert layer.dtype == jnp.bfloat16
        single = kind(depth=3, width=6).apply(variables, images)
        np.testing.assert_allclose(logits, single, atol=0.05 * np.abs(single).max())


def test_training_and_evaluation_are_one(images):
    model = HighwayMLP(depth=3, width=6)
    variables = random_variables(model, images)
    call = functools.partial(model.apply, variables, images)
    np.testing.assert_array_equal(call(train=True), call(train=False))
