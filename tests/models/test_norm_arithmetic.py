"""Normalised maps in float32, or in the maps' own dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.models import BatchNorm, create_model
from resnet_jax.models.fused import Form, plain_batch_norm
from tests.models.reference import KEY, random_variables


def normalized(mean, dtype, arithmetic):
    """What a normalisation makes of x, and what NumPy does in float64."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(mean + rng.normal(size=(1, 64, 8, 8, 4)), dtype)
    scale, bias = rng.uniform(0.5, 1.5, 4), rng.normal(size=4)
    form = Form(dtype=dtype, arithmetic=arithmetic)
    numbers = (jnp.float32(scale), jnp.float32(bias))
    # Op by op: a compiler may leave roundings out.
    y, *_ = plain_batch_norm(x, None, *numbers, form)
    assert y.dtype == dtype
    wide = np.asarray(x, np.float64)
    unit = (wide - wide.mean((1, 2, 3))) / np.sqrt(wide.var((1, 2, 3)) + form.epsilon)
    return np.asarray(y, np.float64), unit * scale + bias


@pytest.mark.parametrize("mean", [0, 10])
def test_in_float32_both_are_the_same_to_rounding(mean):
    for arithmetic in ("wide", "narrow"):
        ours, expected = normalized(mean, jnp.float32, arithmetic)
        np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("mean", [0, 10])
def test_in_bfloat16_the_narrow_one_loses_as_much_as_the_mean_is_large(mean):
    def error(arithmetic):
        ours, expected = normalized(mean, jnp.bfloat16, arithmetic)
        # Beside the rounding of the result, which is up to 2^-9 of it.
        return np.max(np.abs(ours - expected) - np.abs(expected) * 2**-8)

    # Where the mean is small, values of up to 4 deviations count in its place.
    bound = 1.5 * (max(mean, 4) + 2) * 2**-7
    assert error("wide") < 1e-3
    assert 1e-3 < error("narrow") < bound
    if mean:
        assert error("narrow") > 0.02


def test_statistics_are_float32_in_both():
    x = jnp.asarray(100 + np.random.default_rng(0).normal(size=(512, 3)), jnp.bfloat16)

    def statistics(arithmetic):
        norm = BatchNorm(False, dtype=jnp.bfloat16, arithmetic=arithmetic)
        variables = random_variables(norm, x)
        return norm.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

    wide, narrow = statistics("wide"), statistics("narrow")
    assert jax.tree.map(np.array_equal, wide, narrow) == {"mean": True, "var": True}


def test_gradients_of_many_values_are_summed_in_float32():
    """A bfloat16 sum of ones ends at 256."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4096, 2)), jnp.bfloat16)
    form = Form(dtype=jnp.bfloat16, arithmetic="narrow")

    def total(bias):
        y, *_ = plain_batch_norm(x, None, jnp.ones(2), bias, form)
        return y.astype(jnp.float32).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros(2)), [4096, 4096])


def test_in_evaluation_both_are_wide():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.bfloat16)
    wide = BatchNorm(True, dtype=jnp.bfloat16)
    variables = random_variables(wide, x)
    narrow = wide.clone(arithmetic="narrow")
    expected = wide.apply(variables, x)
    np.testing.assert_array_equal(narrow.apply(variables, x), expected)


def test_a_net_of_bfloat16_has_no_float32_map_but_what_reductions_compute():
    """Of its forward pass as traced: each normalisation's maps, x - mean and so on."""
    images = jnp.zeros((2, 8, 8, 3))

    def wide_sums(arithmetic):
        net = create_model(
            "cifar_resnet8", norm_arithmetic=arithmetic, dtype=jnp.bfloat16
        )
        shapes = jax.eval_shape(net.init, KEY, images)
        forward = functools.partial(net.apply, train=True, mutable=["batch_stats"])
        text = str(jax.make_jaxpr(forward)(shapes, images))
        lines = text.splitlines()
        return sum("f32[1,2,8,8,16] = add" in line for line in lines)

    assert wide_sums("wide") == 3
    assert wide_sums("narrow") == 0


def test_a_net_gives_it_to_every_normalisation():
    met = []

    def collect(method, args, kwargs, context):
        if isinstance(context.module, BatchNorm):
            met.append(context.module.arithmetic)
        return method(*args, **kwargs)

    model = create_model("cifar_resnet8", norm_arithmetic="narrow")
    with nn.intercept_methods(collect):
        jax.eval_shape(model.init, KEY, jnp.zeros((2, 8, 8, 3)))
    assert met == ["narrow"] * 7


def test_what_is_unknown_or_fused_is_refused():
    x = jnp.zeros((1, 2, 3))
    with pytest.raises(ValueError, match=r"wide, narrow, not 'half'$"):
        plain_batch_norm(x, None, jnp.ones(3), jnp.ones(3), Form(arithmetic="half"))
    norm = BatchNorm(False, fused=True, arithmetic="narrow")
    with pytest.raises(ValueError, match="wide alone"):
        norm.init(KEY, x[0])
