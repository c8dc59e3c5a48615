"""Many steps in one call: the same run as step by step, wherever it stops.

The two are compiled apart, so that sums are taken in another order: seen were
differences of 4e-7 in parameters of about one after 8 steps, and none in the losses.
"""

import contextlib
import os

import jax
import numpy as np
import pytest

import resnet_jax
from resnet_jax.errors import UserError
from resnet_jax.training.step import call_length, make_train_steps
from tests.conftest import make_console, make_tiny_config
from tests.test_checkpoints import same
from tests.training.helpers import final_state, parts
from tests.training.test_stopping import exact, run_stopped
from tests.training.test_train import EXACT, rows_of, run_killed

MEASURED = {"images_per_second", "input_wait"}


def cuts(steps, most):
    """The calls that a stretch of steps is cut into."""
    lengths = []
    while steps:
        lengths.append(call_length(steps, most))
        steps -= lengths[-1]
    return lengths


def test_a_stretch_is_cut_into_few_lengths():
    assert cuts(100, 128) == [64, 32, 4]
    assert cuts(100, 20) == [16] * 6 + [4]
    assert cuts(3, 1) == [1, 1, 1]


@pytest.mark.parametrize("most", [1, 3, 8, 128])
def test_the_rest_of_a_stretch_is_cut_the_same_after_any_call(most):
    for steps in range(1, 200):
        lengths = cuts(steps, most)
        assert sum(lengths) == steps
        assert max(lengths) <= most
        assert cuts(steps - lengths[0], most) == lengths[1:]


def advanced(config, num_devices, steps_per_call, steps):
    """The state after some steps, on the host."""
    setup = parts(config, num_devices)
    if steps_per_call == 1:
        state = setup.run(steps)
    else:
        assert steps_per_call == steps
        batch_size = config.training.global_batch_size
        indices = setup.feed.training_indices(0, steps, batch_size, config.seed)
        train_steps = make_train_steps(setup.learner)
        state = train_steps(setup.fresh_state(), setup.feed.resident, indices)
    return jax.device_get(state.replace(rng=jax.random.key_data(state.rng)))


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_scanned_steps_are_the_steps(tiny_config, num_devices):
    """With all that a state holds, over the end of an epoch of 32 draws."""
    tiny_config.data.train_split = "train[:40]"
    tiny_config.data.partial_batch = "drop"
    tiny_config.training.global_batch_size = 16
    tiny_config.augmentation.repeats = 2
    tiny_config.augmentation.flip = True
    tiny_config.optimizer.ema_decay = 0.9
    # A mask that is computed again can differ at a ReLU's edge, by the program.
    tiny_config.model.fused_norm = False
    one_by_one = advanced(tiny_config, num_devices, 1, 4)
    assert_close(advanced(tiny_config, num_devices, 4, 4), one_by_one)


@pytest.mark.slow
def test_scanned_steps_have_the_groups_statistics(tiny_config):
    tiny_config.model.batch_norm_groups = 2
    grouped = advanced(tiny_config, 8, 4, 4)
    assert_close(grouped, advanced(tiny_config, 8, 1, 4))
    tiny_config.model.batch_norm_groups = 1
    whole = advanced(tiny_config, 8, 1, 4)
    with pytest.raises(AssertionError):
        assert_close(grouped.batch_stats, whole.batch_stats)


def test_a_warm_up_by_the_training_error_ends_at_the_same_step(tiny_config):
    """In the middle of a call: the rate changes tenfold there, and all that follows."""
    tiny_config.schedule.warmup_learning_rate = 0.01
    tiny_config.schedule.warmup_until_error = 0.95
    tiny_config.schedule.warmup_error_decay = 0.5
    assert advanced(tiny_config, 1, 1, 1).learning_rate == np.float32(0.01)
    one_by_one = advanced(tiny_config, 1, 1, 8)
    assert one_by_one.learning_rate == np.float32(0.1)
    assert_close(advanced(tiny_config, 1, 8, 8), one_by_one)


@pytest.mark.slow
def test_a_bad_loss_inside_a_call_is_named_with_its_step(tiny_config):
    tiny_config.optimizer.learning_rate = 1e37
    bad_step = int(advanced(tiny_config, 1, 1, 4).first_bad_step)
    assert 1 < bad_step < 4
    assert advanced(tiny_config, 1, 4, 4).first_bad_step == bad_step


def make_scanned_config(tfds_dir):
    """Rows and checkpoints at 5 and 10."""
    config = make_tiny_config(tfds_dir)
    config.training.steps_per_call = 8
    config.training.steps = 10
    config.training.log_every_steps = 5
    config.evaluation.every_steps = 10
    config.checkpoint.every_steps = 5
    return config


@pytest.fixture(scope="module")
def scanned(tfds_dir, tmp_path_factory):
    """A config, the workdir of its undisturbed run, and its calls."""
    config, calls = make_scanned_config(tfds_dir), []
    workdir = tmp_path_factory.mktemp("scanned") / "run"
    with recorded_calls(calls):
        resnet_jax.train(config, workdir, make_console())
    return config, workdir, calls


@contextlib.contextmanager
def recorded_calls(calls):
    def recording(steps_left, most):
        calls.append(call_length(steps_left, most))
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resnet_jax.training.train.call_length", recording)
        yield


def test_calls_end_where_something_is_due(scanned):
    _, workdir, calls = scanned
    assert calls == [4, 1, 4, 1]
    assert [row["step"] for row in rows_of(workdir)] == [5, 10]


def test_a_whole_run_is_the_run_step_by_step(scanned, tmp_path, console):
    config, workdir, _ = scanned
    config = config.copy_and_resolve_references()
    config.training.steps_per_call = None  # 1 on the CPU
    calls, one_by_one = [], tmp_path / "one_by_one"
    with recorded_calls(calls):
        resnet_jax.train(config, one_by_one, console)
    assert calls == [1] * 10
    (a, content), (b, _) = (final_state(config, run) for run in (workdir, one_by_one))
    assert content["position"] == 10 * 32
    assert_close(a.params, b.params)
    for found, expected in zip(rows_of(workdir), rows_of(one_by_one), strict=True):
        assert found.keys() - MEASURED == expected.keys() - MEASURED
        for name in expected.keys() & set(EXACT):
            assert found[name] == pytest.approx(expected[name], rel=1e-4)


def test_compiling_is_no_part_of_the_measured_speed(scanned):
    """Of a first call of each length, as are the two before the first row."""
    first, second = rows_of(scanned[1])
    assert "images_per_second" not in first
    assert second["images_per_second"] > 0


# After the first call, of steps 1 to 4, and after the third, of 6 to 9.
@pytest.mark.parametrize(
    ("question", "step"), [(1, 4), pytest.param(3, 9, marks=pytest.mark.slow)]
)
def test_stopped_between_calls_it_ends_bit_for_bit_the_same(
    scanned, tmp_path, monkeypatch, console, question, step
):
    (config, undisturbed, _), stopped = scanned, tmp_path / "stopped"
    told = run_stopped(config, stopped, monkeypatch, question)
    assert f"saved at step {step}; the same" in told
    resnet_jax.train(config, stopped, console)
    assert exact(rows_of(stopped)) == exact(rows_of(undisturbed))
    same(final_state(config, stopped)[0], final_state(config, undisturbed)[0])


def test_killed_it_ends_bit_for_bit_the_same(scanned, tmp_path, console):
    (config, undisturbed, _), killed = scanned, tmp_path / "killed"
    run_killed(config, killed, 10, console)
    resnet_jax.train(config, killed, console)
    assert "continuing from the checkpoint at step 5" in console.file.getvalue()
    assert exact(rows_of(killed)) == exact(rows_of(undisturbed))
    same(final_state(config, killed)[0], final_state(config, undisturbed)[0])


def test_calls_end_where_a_profile_begins_and_ends(scanned, tmp_path, console):
    config, calls = scanned[0].copy_and_resolve_references(), []
    config.training.steps = 5
    config.evaluation.every_steps = 5
    config.profile.steps = "2:3"
    with recorded_calls(calls):
        resnet_jax.train(config, tmp_path / "run", console)
    assert calls == [1, 1, 2, 1]
    traces = [name for *_, names in os.walk(tmp_path / "run") for name in names]
    assert any(name.endswith(".xplane.pb") for name in traces)


def test_streamed_data_are_refused(tiny_config):
    tiny_config.data.resident = False
    tiny_config.training.steps_per_call = 1
    parts(tiny_config)
    tiny_config.training.steps_per_call = 2
    with pytest.raises(UserError, match=r"steps_per_call=2 needs .* data\.resident"):
        parts(tiny_config)
