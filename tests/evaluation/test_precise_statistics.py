"""Batch statistics taken anew at the end of a run."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import resnet_jax
from resnet_jax import parallel
from resnet_jax.errors import UserError
from resnet_jax.evaluation.precise_statistics import precise_variables
from tests.conftest import make_console, make_tiny_config
from tests.training.helpers import final_state, parts

TRAINING_DIGITS = 1437


def with_precise_statistics(setup, state, num_batches):
    variables = precise_variables(
        setup.learner.model,
        setup.config,
        setup.learner.mesh,
        state.evaluation_variables(),
        state.statistics,
        state.rng,
        setup.feed,
        num_batches,
    )
    return state.with_evaluation_variables(variables)


def train(config, workdir):
    resnet_jax.train(config, workdir, make_console())
    return final_state(config, workdir)[0]


def assert_trees(compare, found, expected):
    jax.tree.map(compare, dict(found), dict(expected))


equal = np.testing.assert_array_equal


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("batch_size", "num_batches"), [(1437, 1), (479, 3)])
def test_the_first_layer_has_the_closed_form_over_the_training_set(
    tiny_config, batch_size, num_batches
):
    tiny_config.augmentation.pad = 0
    tiny_config.training.global_batch_size = batch_size
    setup = parts(tiny_config, 1)
    state = setup.fresh_state()
    found = with_precise_statistics(setup, state, num_batches)

    images = np.float64(setup.dataset.train.arrays(1)[0]) / 255
    assert len(images) == TRAINING_DIGITS
    padded = np.pad(images - images.mean(0), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(state.params["stem"]["conv"]["kernel"], np.float64)
    size = images.shape[1]
    maps = sum(
        padded[:, i : i + size, j : j + size] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )
    norm = found.batch_stats["stem"]["norm"]
    close(norm["mean"], maps.mean((0, 1, 2)))
    close(norm["var"], maps.var((0, 1, 2), ddof=1))


def test_all_devices_together_have_the_statistics_of_one(tiny_config):
    tiny_config.model.batch_norm_groups = 4
    one, eight = parts(tiny_config, 1), parts(tiny_config, 8)
    first = with_precise_statistics(one, one.fresh_state(), 3)
    second = with_precise_statistics(eight, eight.fresh_state(), 3)
    assert_trees(close, second.batch_stats, first.batch_stats)


@pytest.fixture(scope="module")
def runs(tfds_dir, tmp_path_factory):
    """A run with and a run without precise statistics: config, workdir, state."""
    found = {}
    for examples in (0, 90):
        config = make_tiny_config(tfds_dir)
        config.evaluation.precise_statistics_examples = examples
        workdir = tmp_path_factory.mktemp("precise") / str(examples)
        found[examples] = config, workdir, train(config, workdir)
    return found


def test_nothing_but_the_last_statistics_changes(runs):
    running, precise = runs[0][2], runs[90][2]
    assert_trees(equal, precise.params, running.params)
    assert_trees(equal, precise.opt_state[1].trace, running.opt_state[1].trace)
    stats = precise.batch_stats["stem"]["norm"], running.batch_stats["stem"]["norm"]
    assert not np.allclose(stats[0]["var"], stats[1]["var"], rtol=1e-3)
    rows = [
        [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
        for _, workdir, _ in runs.values()
    ]
    # The evaluation at step 6 is not the last: it has the running averages.
    assert rows[0][2]["test_loss"] == rows[1][2]["test_loss"]
    assert rows[0][-1]["test_loss"] != rows[1][-1]["test_loss"]


def test_ninety_examples_are_three_whole_batches_from_the_first_on(runs):
    config, _, running = runs[0]
    setup = parts(config)
    expected = with_precise_statistics(setup, running, 3)
    assert_trees(equal, runs[90][2].batch_stats, expected.batch_stats)


def test_evaluate_reports_the_numbers_of_the_run(runs):
    _, workdir, _ = runs[90]
    result = json.loads((workdir / "result.json").read_text())
    for options in ({}, {"precise_batches": 3}):
        found = resnet_jax.evaluate(workdir, console=make_console(), **options)
        assert found["loss"] == pytest.approx(result["test_loss"], rel=1e-6)
        assert found["errors"] == result["test_errors"]


def test_a_run_that_goes_on_ends_with_the_same_statistics(runs, tmp_path):
    config, finished, expected = runs[90]
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "12")
    found = train(config, workdir)
    assert_trees(equal, found.batch_stats, expected.batch_stats)
    assert_trees(equal, found.params, expected.params)


def test_streamed_data_give_the_statistics_of_resident_ones(tiny_config, tmp_path):
    tiny_config.evaluation.precise_statistics_examples = 64
    tiny_config.training.steps = 2
    states = []
    for resident in (True, False):
        tiny_config.data.resident = resident
        states.append(train(tiny_config, tmp_path / str(resident)))
    # Two programs, which XLA may round differently.
    assert_trees(close, states[0].batch_stats, states[1].batch_stats)


def test_averaged_weights_have_statistics_of_their_own(tiny_config):
    tiny_config.optimizer.ema_decay = 0.5
    setup = parts(tiny_config, 1)
    fresh = setup.fresh_state()
    averaged = jax.tree.map(lambda leaf: 2 * leaf, fresh.ema["params"])
    state = dataclasses.replace(fresh, ema=fresh.ema | {"params": averaged})
    found = with_precise_statistics(setup, state, 2)
    assert_trees(equal, found.batch_stats, fresh.batch_stats)
    assert_trees(equal, found.ema["params"], averaged)
    plain = dataclasses.replace(fresh, ema=None)
    expected = with_precise_statistics(setup, plain, 2).batch_stats
    # Twice the first kernel: twice the mean, four times the variance.
    stem, reference = found.ema["batch_stats"]["stem"], expected["stem"]
    close(stem["norm"]["mean"], 2 * reference["norm"]["mean"])
    close(stem["norm"]["var"], 4 * reference["norm"]["var"])


def test_a_net_without_batch_normalisation_is_refused(tiny_config, tmp_path):
    tiny_config.model.name = "cifar_highway19"
    tiny_config.evaluation.precise_statistics_examples = 64
    with pytest.raises(UserError, match="cifar_highway19 has none: set it to 0"):
        train(tiny_config, tmp_path)


def test_programs_on_simulated_devices_are_waited_for(
    tiny_config, tmp_path, monkeypatch
):
    """Each step, batch of statistics, evaluated batch and checksum, one by one."""
    waited = []
    settled = parallel.settled

    def recorded(tree):
        waited.append(type(tree).__name__)
        return settled(tree)

    monkeypatch.setattr(parallel, "settled", recorded)
    tiny_config.training.steps = 3
    tiny_config.evaluation.every_steps = 3
    tiny_config.evaluation.batch_size = 120
    tiny_config.evaluation.precise_statistics_examples = 64
    resnet_jax.train(tiny_config, tmp_path)
    # Checksums of a checkpoint's arrays are pairs.
    programs = [name for name in waited if name != "tuple"]
    assert programs[:8] == ["TrainState"] * 3 + ["dict"] * 2 + ["Sums"] * 3
    assert set(programs[8:]) == {"ArrayImpl"}  # for the report's pictures
    assert "tuple" in waited
