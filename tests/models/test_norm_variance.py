"""What the fast variance keeps, and what it loses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.models import BatchNorm, create_model
from resnet_jax.models.fused import batch_moments
from tests.models.reference import KEY


def drawn(mean, std, shape=(2, 64, 8, 8, 3)):
    rng = np.random.default_rng(0)
    return (mean + std * rng.normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize("variance", ["two_pass", "fast"])
def test_both_are_numpys_where_the_mean_is_small(variance):
    x = drawn(1, 2)
    mean, var = batch_moments(x, variance)
    assert mean.shape == var.shape == (2, 1, 1, 1, 3)
    wide, axes = x.astype(np.float64), (1, 2, 3)
    np.testing.assert_allclose(mean, wide.mean(axes, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(var, wide.var(axes, keepdims=True), rtol=1e-5)


def test_a_mean_of_100_and_a_deviation_of_a_hundredth_leave_nothing_of_the_fast_one():
    """E[x^2] is 10000.0001, and float32 has no number between 10000 and 10000.001."""
    x = np.float32(100) + np.float32(0.01) * np.tile(np.float32([1, -1]), 512)
    x = jnp.asarray(x.reshape(1, 1024, 1))
    mean, exact = batch_moments(x)
    np.testing.assert_allclose(mean, 100)
    np.testing.assert_allclose(exact, 1e-4, rtol=1e-3)
    assert batch_moments(x, "fast")[1] == 0


def test_the_fast_variance_is_never_negative():
    """Where it cancels it is what rounding leaves, and that has both signs."""
    x = drawn(1000, 1e-3, (1, 512, 256))
    wide = np.float32(np.square(x).mean(1)) - np.square(np.float32(x.mean(1)))
    assert (wide < 0).any()
    _, var = batch_moments(x, "fast")
    assert (np.asarray(var) >= 0).all()
    assert (np.asarray(batch_moments(x)[1]) > 0).all()


def test_the_normalisation_takes_it_and_two_passes_are_the_default():
    x = drawn(100, 0.01, (256, 4))
    stats = {"mean": np.zeros(4, np.float32), "var": np.zeros(4, np.float32)}
    params = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    exact = x.astype(np.float64).var(0, ddof=1)

    def running_variance(**options):
        norm = BatchNorm(use_running_average=False, momentum=0.0, **options)
        variables = {"params": params, "batch_stats": stats}
        _, updated = norm.apply(variables, x, mutable=["batch_stats"])
        return np.asarray(updated["batch_stats"]["var"])

    np.testing.assert_allclose(running_variance(), exact, rtol=1e-3)
    for fused in (False, True):
        fast = running_variance(variance="fast", fused=fused)
        assert (np.abs(fast / exact - 1) > 0.1).all()


@pytest.mark.parametrize("variance", ["two_pass", "fast"])
def test_a_net_gives_it_to_every_normalisation(variance):
    met = []

    def collect(method, args, kwargs, context):
        if isinstance(context.module, BatchNorm):
            met.append(context.module.variance)
        return method(*args, **kwargs)

    model = create_model("cifar_resnet8", norm_variance=variance)
    with nn.intercept_methods(collect):
        jax.eval_shape(model.init, KEY, jnp.zeros((2, 8, 8, 3)))
    assert met == [variance] * 7


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match=r"two_pass, fast, not 'slow'$"):
        batch_moments(jnp.zeros((1, 2, 3)), "slow")
