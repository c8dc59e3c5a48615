"""Batch statistics in one pass, also of numbers far from zero."""

import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models.fused import batch_moments


def drawn(mean, std, shape=(2, 64, 8, 8, 3)):
    rng = np.random.default_rng(0)
    return (mean + std * rng.normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(2, 64, 8, 8, 3), (2, 64, 3), (2, 7, 1, 5, 3)])
def test_moments_are_numpys(shape):
    x = drawn(1, 2, shape)
    mean, var = batch_moments(jnp.asarray(x))
    axes = tuple(range(1, x.ndim - 1))
    wide = x.astype(np.float64)
    assert mean.shape == var.shape == (2, *[1] * len(axes), 3)
    np.testing.assert_allclose(mean, wide.mean(axes, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(var, wide.var(axes, keepdims=True), rtol=1e-5)


def test_a_mean_of_100_and_a_deviation_of_a_hundredth():
    """E[x^2] is 10000.0001, and float32 has no number between 10000 and 10000.001."""
    x = np.float32(100) + np.float32(0.01) * np.tile(np.float32([1, -1]), 512)
    x = jnp.asarray(x.reshape(1, 4, 256, 1))
    mean, var = batch_moments(x)
    np.testing.assert_allclose(mean, 100)
    np.testing.assert_allclose(var, 1e-4, rtol=1e-3)
    assert jnp.square(x).mean() - jnp.square(x.mean()) == 0


def test_the_variance_is_never_negative():
    """Where it cancels it is what rounding leaves, and that has both signs."""
    middles = np.full((1, 512, 3, 256), 1000, np.float32)
    middles[:, :, 1] = 0  # so that nothing near the mean is subtracted
    x = middles + drawn(0, 1e-3, middles.shape)
    _, var = batch_moments(jnp.asarray(x))
    assert (np.asarray(var) >= 0).all()
    x = drawn(1000, 1e-3, (1, 512, 256))
    _, var = batch_moments(jnp.asarray(x))
    assert (np.asarray(var) > 0).all()
