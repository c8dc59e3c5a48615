import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.config import default_config, derive, resolve
from resnet_jax.training.schedule import Schedule


def schedule(holdout=0, steps=100, **fields):
    config = default_config()
    config.training.steps = steps
    config.data.holdout_examples = holdout
    config.schedule.update(fields)
    config = resolve(config)
    return Schedule(config.optimizer, config.schedule, derive(config, 1000))


def rates(of, steps):
    return np.array([float(of.rate(of.init(), jnp.int32(step))) for step in steps])


def test_piecewise_falls_after_the_given_steps():
    of = schedule(steps=64_000, kind="piecewise", boundaries_steps=(32_000, 48_000))
    found = rates(of, [0, 31_999, 32_000, 47_999, 48_000, 63_999])
    np.testing.assert_allclose(found, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)


def test_cosine_after_a_linear_warm_up():
    of = schedule(kind="cosine", warmup_steps=20)
    steps = np.arange(100)
    expected = np.where(
        steps < 20,
        0.1 * (steps + 1) / 20,
        0.05 * (1 + np.cos(np.pi * (steps - 20) / 80)),
    )
    np.testing.assert_allclose(rates(of, steps), expected, atol=1e-7)


def test_cosine_ends_at_the_final_rate():
    of = schedule(kind="cosine", final_learning_rate=0.01)
    steps = np.arange(101)
    expected = 0.01 + 0.09 / 2 * (1 + np.cos(np.pi * steps / 100))
    np.testing.assert_allclose(rates(of, steps), expected, rtol=1e-6)
    assert rates(of, [100])[0] == pytest.approx(0.01)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_polynomial_after_a_linear_warm_up(power):
    of = schedule(
        kind="polynomial", power=power, warmup_steps=20, final_learning_rate=0.01
    )
    steps = np.arange(102)
    left = 1 - np.clip(steps - 20, 0, 80) / 80
    expected = np.where(steps < 20, 0.1 * (steps + 1) / 20, 0.01 + 0.09 * left**power)
    np.testing.assert_allclose(rates(of, steps), expected, rtol=1e-5)


def test_polynomial_of_power_two_is_the_default_and_ends_at_zero():
    of = schedule(kind="polynomial")
    found = rates(of, [0, 50, 90, 100])
    np.testing.assert_allclose(found, [0.1, 0.025, 0.001, 0], rtol=1e-4, atol=1e-9)


def test_warm_up_starts_at_its_initial_rate():
    of = schedule(
        kind="piecewise",
        boundaries_steps=(60,),
        warmup_steps=20,
        warmup_initial_learning_rate=0.02,
    )
    steps = np.array([0, 9, 18, 19, 20, 59, 60])
    # One twentieth of the way is gone in the first step, all of it in the twentieth.
    expected = [0.024, 0.06, 0.096, 0.1, 0.1, 0.1, 0.01]
    np.testing.assert_allclose(rates(of, steps), expected, rtol=1e-6)


def test_warm_up_ends_once_the_averaged_error_is_below_and_never_returns():
    of = schedule(warmup_learning_rate=0.01, warmup_until_error=0.8)
    state, average, seen = of.init(), 1.0, []
    for step, error in enumerate([0.9] * 10 + [0.5] * 10 + [1.0] * 30):
        rate = float(of.rate(state, jnp.int32(step)))
        assert rate == pytest.approx(0.01 if all(a >= 0.8 for a in seen) else 0.1)
        state = of.after_batch(state, jnp.float32(error))
        average = 0.9 * average + 0.1 * error
        seen.append(average)
    # One batch below 80 % is not enough; and the error came back above it at the end.
    assert 11 < sum(a >= 0.8 for a in seen[:20]) < 20
    assert seen[-1] > 0.9
    assert float(of.rate(state, jnp.int32(50))) == pytest.approx(0.1)


def test_plateau_divides_after_patience_evaluations_without_a_better_error():
    of = schedule(
        holdout=10, kind="plateau", plateau_patience=2, plateau_min_improvement=0.01
    )
    state, found = of.init(), []
    for error in [0.5, 0.4, 0.395, 0.41, 0.3, 0.3, 0.3, 0.3, 0.3]:
        state = of.after_evaluation(state, jnp.float32(error))
        found.append(float(of.rate(state, jnp.int32(0))))
    # 0.395 and 0.41 are no better than 0.4 - 0.01; then 0.3 is, once.
    expected = [0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001, 0.0001]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
