"""Stochastic depth against its definition (Huang et al. 2016)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models import StochasticDepth
from resnet_jax.models.wrappers import linear_rates
from tests.models.reference import KEY


def draw(y, rate, seed=0, deterministic=False, per_example=True):
    module = StochasticDepth(deterministic, per_example)
    rngs = {"dropout": jax.random.fold_in(KEY, seed)}
    return jax.jit(lambda y: module.apply({}, y, rate, rngs=rngs))(y)


@pytest.fixture
def y():
    return np.random.default_rng(0).uniform(1, 2, (4096, 2, 3)).astype(np.float32)


@pytest.mark.parametrize("rate", [0.2, 0.75])
def test_examples_are_dropped_whole_or_divided_by_the_chance_of_being_kept(y, rate):
    result = np.asarray(draw(y, rate))
    dropped = (result == 0).all((1, 2))
    np.testing.assert_array_equal(result[dropped], 0)
    np.testing.assert_allclose(result[~dropped], y[~dropped] / (1 - rate), rtol=1e-6)
    # The share of dropped ones is binomial: five of its standard deviations.
    error = 5 * np.sqrt(rate * (1 - rate) / len(y))
    assert dropped.mean() == pytest.approx(rate, abs=error)
    # Thus the expectation is y itself.
    assert result.mean() / y.mean() == pytest.approx(1, abs=error / (1 - rate) + 0.01)


def test_a_whole_batch_is_dropped_at_once(y):
    module = StochasticDepth(deterministic=False, per_example=False)

    @jax.jit
    @jax.vmap
    def draws(key):
        return module.apply({}, y[:8], 0.5, rngs={"dropout": key})

    results = np.asarray(draws(jax.random.split(jax.random.key(0), 40)))
    kept = results.any((1, 2, 3))
    for result, is_kept in zip(results, kept):
        np.testing.assert_allclose(result, 2 * y[:8] * is_kept, rtol=1e-6)
    # 40 throws of a coin: between 7 and 33 of them but for one time in 10^5.
    assert 7 < kept.sum() < 33


def test_the_key_determines_the_draw(y):
    np.testing.assert_array_equal(draw(y, 0.5), draw(y, 0.5))
    different = (np.asarray(draw(y, 0.5, 0)) == 0) != (np.asarray(draw(y, 0.5, 1)) == 0)
    assert 0.4 < different.mean() < 0.6


def test_evaluation_returns_what_it_is_given_and_draws_nothing(y):
    module = StochasticDepth(deterministic=True)
    np.testing.assert_array_equal(module.apply({}, y, 0.9), y)  # no rng is given
    training = StochasticDepth(deterministic=False)
    np.testing.assert_array_equal(training.apply({}, y, 0.0), y)


def test_a_rate_may_be_traced(y):
    """As in a loop over blocks, where each has its own."""
    module = StochasticDepth(deterministic=False)

    @jax.jit
    def apply(y, rate):
        return module.apply({}, y, rate, rngs={"dropout": KEY})

    np.testing.assert_array_equal(apply(y, jnp.float32(0)), y)
    dropped = (np.asarray(apply(y, jnp.float32(0.3))) == 0).mean()
    assert dropped == pytest.approx(0.3, abs=0.05)


def test_dropped_examples_give_no_gradient(y):
    def total(y):
        return draw(y, 0.5).sum()

    gradient = np.asarray(jax.grad(total)(y))
    np.testing.assert_array_equal(gradient, np.where(draw(y, 0.5) == 0, 0, 2))


@pytest.mark.parametrize("rate", [0.2 / 54, 0.3])
def test_the_chance_is_that_of_float32_in_bfloat16_too(rate):
    """bfloat16 would round a keep rate of 0.996 up, or draw no number above it."""
    count = 100_000
    result = draw(jnp.ones((count, 1), jnp.bfloat16), rate)
    assert result.dtype == jnp.bfloat16
    error = 5 * np.sqrt(rate * (1 - rate) / count)
    assert (np.asarray(result) == 0).mean() == pytest.approx(rate, abs=error)
    kept = float(result.max())
    assert kept == pytest.approx(1 / (1 - rate), rel=2.0**-8)


def test_rates_grow_linearly_to_the_last():
    np.testing.assert_allclose(linear_rates(0.5, 5), [0.1, 0.2, 0.3, 0.4, 0.5])
    assert linear_rates(0.3, 1) == (0.3,)
    assert linear_rates(0.0, 3) == (0.0, 0.0, 0.0)
    assert linear_rates(0.5, 54)[-1] == 0.5


def test_both_kinds_agree_for_a_single_example(y):
    one = functools.partial(draw, y[:1], 0.5, 3)
    np.testing.assert_array_equal(one(per_example=True), one(per_example=False))
