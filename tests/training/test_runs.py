import json
import math

import numpy as np
import pytest

import resnet_jax
from resnet_jax.config import resolve
from resnet_jax.data.feeds import LastDataset, ResidentFeed
from resnet_jax.errors import Preempted, UserError
from resnet_jax.evaluation.figures import Spread
from resnet_jax.parallel import data_mesh
from resnet_jax.training import train as train_module
from resnet_jax.training.runs import members_of, train_members
from tests.conftest import make_console, make_tiny_config


@pytest.fixture(scope="module")
def finished(tfds_dir, tmp_path_factory):
    """Runs of two seeds: config, workdir and result."""
    config = make_tiny_config(tfds_dir)
    config.seed, config.seeds = 3, 2
    workdir = tmp_path_factory.mktemp("seeds") / "runs"
    return config, workdir, resnet_jax.train(config, workdir, make_console())


def test_each_seed_is_the_run_that_it_is_alone(finished, tmp_path):
    config, workdir, result = finished
    assert sorted(result["runs"]) == ["seed-3", "seed-4"]
    config = config.copy_and_resolve_references()
    config.seed, config.seeds = 4, 1
    alone = resnet_jax.train(config, tmp_path / "alone", make_console())
    clocks = ("seconds", "images_per_second", "input_wait")

    def rows(folder):
        lines = (folder / "metrics.jsonl").open()
        return [
            {k: v for k, v in json.loads(line).items() if k not in clocks}
            for line in lines
        ]

    assert rows(workdir / "seed-4") == rows(tmp_path / "alone")
    assert result["runs"]["seed-4"]["test_errors"] == alone["test_errors"]


def test_the_result_is_the_mean_and_the_deviation_of_a_sample(finished):
    _, workdir, result = finished
    errors = np.array([run["test_error"] for run in result["runs"].values()])
    assert result["test_error"] == pytest.approx(errors.mean())
    assert result["test_error_deviation"] == pytest.approx(errors.std(ddof=1))
    assert json.loads((workdir / "result.json").read_text()) == result
    page = (workdir / "report.html").read_text()
    assert f"test error {100 * errors.mean():.2f} \u00b1" in page
    assert "(2 seeds)" in page


def test_finished_seeds_are_not_run_again(finished, monkeypatch):
    config, workdir, result = finished

    def never(*_):
        raise AssertionError("it was run again")

    monkeypatch.setattr("resnet_jax.training.train.train_one", never)
    again = resnet_jax.train(config, workdir, make_console())
    assert again["runs"] == result["runs"]


def test_more_seeds_are_added_to_those_that_are_there(finished, tmp_path):
    config, workdir, result = finished
    more = config.copy_and_resolve_references()
    more.seeds = 3
    added = resnet_jax.train(more, workdir, make_console())
    assert list(added["runs"]) == ["seed-3", "seed-4", "seed-5"]
    assert added["runs"]["seed-3"] == result["runs"]["seed-3"]


def test_an_interrupted_run_goes_on(tiny_config, tmp_path, monkeypatch):
    tiny_config.seeds = 2
    train, stopped = train_module.train_one, []

    def stop_once(*arguments):
        if len(stopped) == 1:
            stopped.append(2)
            raise Preempted("stopped")
        stopped.append(1)
        return train(*arguments)

    monkeypatch.setattr("resnet_jax.training.train.train_one", stop_once)
    with pytest.raises(Preempted):
        resnet_jax.train(tiny_config, tmp_path / "runs", make_console())
    assert not (tmp_path / "runs" / "result.json").exists()
    result = resnet_jax.train(tiny_config, tmp_path / "runs", make_console())
    assert list(result["runs"]) == ["seed-0", "seed-1"]


def test_a_seed_that_diverges_is_told_and_not_run_again(tiny_config, tmp_path):
    tiny_config.optimizer.learning_rate = 1e30
    members = members_of(resolve(tiny_config), "wild/")
    console = make_console()
    outcomes = train_members(members, tmp_path, train_module.train_one, console)
    assert outcomes[0].result is None
    assert "not finite" in outcomes[0].failure
    again = make_console()
    assert (
        train_members(members, tmp_path, train_module.train_one, again)[0].failure
        == outcomes[0].failure
    )
    assert "[1/1] wild/seed-0: diverged" in again.file.getvalue()
    tiny_config.seeds = 2
    with pytest.raises(UserError, match=r"all 2 runs diverged"):
        resnet_jax.train(tiny_config, tmp_path / "all", console)


def test_one_run_and_several_do_not_share_a_workdir(finished, tiny_config, tmp_path):
    config, workdir, _ = finished
    single = config.copy_and_resolve_references()
    single.seeds = 1
    with pytest.raises(UserError, match=r"holds runs of \d seeds.*another --workdir"):
        resnet_jax.train(single, workdir, make_console())
    with pytest.raises(UserError, match=r"give one of them, such as .*seed-3"):
        resnet_jax.evaluate(workdir)


def test_seeds_have_an_end(tiny_config):
    tiny_config.seed, tiny_config.seeds = 2**31 - 2, 3
    with pytest.raises(UserError, match="lower seed"):
        resolve(tiny_config)


def test_spread_is_that_of_a_sample():
    spread = Spread.of([0.06, 0.07, 0.08])
    assert (spread.mean, spread.deviation, spread.count) == pytest.approx(
        (0.07, 0.01, 3)
    )
    assert spread.percent() == "7.00 \u00b1 1.00 % (3 seeds)"
    assert Spread.of([0.0643]).percent() == "6.43 % (1 seed)"
    assert Spread.of([0.5]).deviation is None
    assert not math.isnan(spread.deviation)


def test_runs_in_a_row_decode_the_data_once(tiny_config, image_folder):
    tiny_config.data.path, tiny_config.data.name = str(image_folder), "images"
    config = resolve(tiny_config)
    datasets = LastDataset()
    first = datasets.open(config)
    assert datasets.open(config) is first
    images, labels, _ = first.train.arrays(1)
    for file in image_folder.glob("*/*/*.png"):
        file.unlink()
    again, same_labels, _ = datasets.open(config).train.arrays(1)
    np.testing.assert_array_equal(again, images)
    np.testing.assert_array_equal(same_labels, labels)
    np.testing.assert_allclose(
        first.train.statistics().mean, images.mean(0) / 255, rtol=1e-6
    )
    # A feed may not change what the next run gets.
    feed = ResidentFeed.load(
        first.train, data_mesh(1), config.data, config.augmentation
    )
    assert feed.num_examples == len(labels)
