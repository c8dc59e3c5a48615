"""The stem's max-pooling against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.models.pooling import max_pool_3x3
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


def test_a_value_that_is_not_a_number_stays():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 1, 0].set(jnp.nan)
    assert jnp.isnan(max_pool_3x3(x)).all()


def test_bfloat16_gradients_are_summed_in_float32():
    x = jnp.zeros((1, 5, 5, 1), jnp.bfloat16).at[0, 1, 1, 0].set(1)
    gradient = jnp.asarray([[1, 2**-8], [2**-8, 0]], jnp.bfloat16)
    gradient = jnp.zeros((1, 3, 3, 1), jnp.bfloat16).at[0, :2, :2, 0].set(gradient)
    total = jax.vjp(max_pool_3x3, x)[1](gradient)[0]
    assert total.dtype == jnp.bfloat16
    assert float(total[0, 1, 1, 0]) == 1 + 2**-7
