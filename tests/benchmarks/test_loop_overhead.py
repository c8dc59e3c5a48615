"""Where the windows lie in a run, and that they can be read from its rows."""

import pytest

from benchmarks import loop_overhead
from resnet_jax import UserError


def test_a_run_evaluates_and_saves_after_its_last_window_only():
    config = loop_overhead.measured_config(
        str(loop_overhead.DIGITS), {}, window=20, windows=3
    )
    assert config.training.log_every_steps == 10
    assert config.training.steps == 4 * 20 + 10
    assert config.evaluation.every_steps == config.training.steps
    assert config.checkpoint.every_steps == config.training.steps


def test_windows_must_end_at_rows():
    with pytest.raises(UserError, match="not a multiple"):
        loop_overhead.measured_config(str(loop_overhead.DIGITS), {}, 25, 3)


def test_a_streamed_data_set_is_refused(tfds_dir):
    overrides = {"data.data_dir": tfds_dir, "data.resident": "False"}
    config = loop_overhead.measured_config(
        str(loop_overhead.DIGITS), overrides, window=10, windows=1
    )
    with pytest.raises(UserError, match="streamed"):
        loop_overhead.BareStep(config)


def test_a_round_measures_loop_and_bare_step(tfds_dir):
    overrides = {
        "data.data_dir": tfds_dir,
        "training.global_batch_size": "8",
        "training.log_every_steps": "1",
    }
    config = loop_overhead.measured_config(
        f"{loop_overhead.DIGITS}:cifar_resnet8", overrides, window=2, windows=2
    )
    figures = loop_overhead.measure_round(
        loop_overhead.BareStep(config), config, window=2, windows=2
    )
    assert len(figures["loop_window_seconds"]) == len(figures["ratios"]) == 2
    assert len(figures["bare_window_seconds"]) == 3
    assert all(seconds > 0 for seconds in figures["loop_window_seconds"])
    assert figures["loop_own_images_per_second"] > 0


def test_rows_behind_the_last_window_end_none():
    class Bare:
        def seconds(self, steps):
            return float(steps)

    turns = loop_overhead.TakingTurns(Bare(), window=10, windows=2)
    for step in (10, 20, 30, 40):
        turns.write(f"step {step}/40")
    assert (len(turns.loop), turns.bare) == (2, [10.0] * 3)


def test_a_steady_drift_of_the_machine_falls_out_of_the_ratios():
    """The loop takes 1.25 times the bare step, and all slows down from turn to turn."""
    bare, loop = [1.0, 3.0, 5.0], [1.25 * 2.0, 1.25 * 4.0]
    assert loop_overhead.ratios(loop, bare) == pytest.approx([0.8, 0.8])


def test_the_interval_of_a_median_is_that_of_its_order_statistics():
    """Of 101 values: ranks 41 and 61 by the binomial distribution, one more or less."""
    low, high = loop_overhead.median_interval(range(1, 102))
    assert low == pytest.approx(41, abs=1)
    assert high == pytest.approx(61, abs=1)
