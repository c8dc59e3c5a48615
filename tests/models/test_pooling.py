"""The stem's max-pooling against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.models.pooling import max_pool, max_pool_3x3
from tests.models.reference import double_precision


def reference(x):
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 7, 5, 2), (2, 1, 4, 1)])
@pytest.mark.parametrize("values", [None, 3], ids=["all different", "with ties"])
def test_values_and_gradients_are_those_of_xla(shape, values):
    with double_precision():
        rng = np.random.default_rng(0)
        x = rng.normal(size=shape) if values is None else rng.integers(0, values, shape)
        x = jnp.asarray(x, jnp.float64)
        expected, pull_expected = jax.vjp(reference, x)
        pooled, pull = jax.vjp(max_pool_3x3, x)
        np.testing.assert_array_equal(pooled, expected)
        gradient = jnp.asarray(rng.normal(size=pooled.shape))
        np.testing.assert_allclose(
            pull(gradient)[0], pull_expected(gradient)[0], rtol=1e-14, atol=1e-14
        )


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 7, 5, 2), (1, 3, 4, 1)])
@pytest.mark.parametrize(("size", "padding"), [(3, 1), (2, 0)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_pooling_of_inference_is_that_of_training(shape, size, padding, dtype):
    """Inference has a form of its own; gradients are XLA's, bit for bit, with ties."""

    def pool(x):
        return max_pool(x, size, padding)

    def windows(x):
        return nn.max_pool(x, (size, size), (2, 2), ((padding, padding),) * 2)

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-3, 3, shape), dtype)
    expected, pull_expected = jax.vjp(windows, x)
    pooled, pull = jax.vjp(pool, x)
    for values in (jax.jit(pool)(x), pool(x), pooled):
        assert values.dtype == dtype
        np.testing.assert_array_equal(values, expected)
    gradient = jnp.asarray(rng.normal(size=pooled.shape), dtype)
    np.testing.assert_array_equal(pull(gradient)[0], pull_expected(gradient)[0])
    lowered = jax.jit(pool).lower(x).as_text()
    assert ("reduce_window" in lowered) == (jax.default_backend() != "cpu")


@pytest.mark.parametrize("pool", [max_pool_3x3, lambda x: max_pool(x, 3, 1)])
def test_a_value_that_is_not_a_number_stays(pool):
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 1, 0].set(jnp.nan)
    assert jnp.isnan(pool(x)).all()


def test_bfloat16_gradients_are_summed_in_float32():
    x = jnp.zeros((1, 5, 5, 1), jnp.bfloat16).at[0, 1, 1, 0].set(1)
    gradient = jnp.asarray([[1, 2**-8], [2**-8, 0]], jnp.bfloat16)
    gradient = jnp.zeros((1, 3, 3, 1), jnp.bfloat16).at[0, :2, :2, 0].set(gradient)
    total = jax.vjp(max_pool_3x3, x)[1](gradient)[0]
    assert total.dtype == jnp.bfloat16
    assert float(total[0, 1, 1, 0]) == 1 + 2**-7
