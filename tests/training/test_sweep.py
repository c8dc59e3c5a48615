import json

import numpy as np
import pytest

from resnet_jax.cli import main
from resnet_jax.errors import UserError
from resnet_jax.training.sweep import parse_grid, sweep
from tests.conftest import REPOSITORY, make_console

DIGITS = f"{REPOSITORY}/configs/digits.py:cifar_resnet8"


@pytest.fixture(scope="module")
def overrides(tfds_dir):
    return {
        "data.data_dir": tfds_dir,
        "data.holdout_examples": "100",
        "training.steps": "4",
        "schedule.warmup_steps": "1",
        "training.global_batch_size": "16",
        "seeds": "2",
    }


@pytest.fixture(scope="module")
def finished(overrides, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    console = make_console()
    grid = {"optimizer.learning_rate": ["0.05", "1e30"]}
    rows = sweep(DIGITS, grid, workdir, overrides=overrides, console=console)
    return workdir, rows, console.file.getvalue()


def test_a_point_has_the_mean_and_deviation_of_its_seeds(finished):
    workdir, rows, printed = finished
    folder = workdir / "optimizer.learning_rate=0.05"
    results = [
        json.loads((folder / f"seed-{seed}" / "result.json").read_text())
        for seed in (0, 1)
    ]
    good, wild = rows
    for metric in ("test_error", "holdout_error", "train_error"):
        values = [result[metric] for result in results]
        assert good[metric] == pytest.approx(np.mean(values))
        assert good[f"{metric}_deviation"] == pytest.approx(np.std(values, ddof=1))
    assert (good["n"], good["diverged"]) == (2, 0)
    assert (wild["n"], wild["diverged"]) == (0, 2)
    assert json.loads((workdir / "sweep.json").read_text())["points"] == rows
    page = (workdir / "report.html").read_text()
    assert page.count("<svg") == 1
    assert f"{100 * good['test_error']:.2f} \u00b1" in page
    assert "held-out error" in printed


def test_a_larger_grid_runs_what_is_new(finished, overrides):
    workdir, rows, _ = finished
    console = make_console()
    grid = {"optimizer.learning_rate": ["0.05", "0.1"]}
    again = sweep(DIGITS, grid, workdir, overrides=overrides, console=console)
    assert again[0] == rows[0]
    printed = console.file.getvalue()
    assert "[1/4] optimizer.learning_rate=0.05/seed-0: test error" in printed
    assert "[3/4] optimizer.learning_rate=0.1/seed-0\n" in printed


def test_all_points_are_checked_before_any_is_run(tmp_path, overrides):
    grid = {"optimizer.learning_rate": ["0.1", "fast"]}
    with pytest.raises(UserError, match=r"learning_rate takes a number, not 'fast'"):
        sweep(DIGITS, grid, tmp_path, overrides=overrides, console=make_console())
    assert list(tmp_path.iterdir()) == []


def test_grids_are_read():
    assert parse_grid(["a.b=1, 2", "c=(1,2),(3,4)"]) == {
        "a.b": ["1", "2"],
        "c": ["(1,2)", "(3,4)"],
    }
    for wrong in ("a", "a=", "a=1,,2", "=1"):
        with pytest.raises(UserError, match="FIELD=VALUE,VALUE"):
            parse_grid([wrong])
    with pytest.raises(UserError, match="twice"):
        parse_grid(["a=1,1"])


def test_wrong_grids_are_told(tmp_path, capsys):
    def error(*arguments):
        command = ["sweep", "--config", DIGITS, "--workdir", str(tmp_path)]
        assert main([*command, *arguments]) == 1
        return capsys.readouterr().err

    assert "a sweep needs fields" in error()
    assert "give --config.seeds=N" in error("--grid", "seed=1,2")
    both = ("--grid", "training.steps=1,2", "--config.training.steps=3")
    assert "both in the grid and overridden" in error(*both)
    assert "did you mean --config.training.steps" in error(
        "--grid", "training.step=1,2"
    )
