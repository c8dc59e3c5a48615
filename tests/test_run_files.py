"""The JSON files of a workdir, damaged in many ways."""

import json
import os

import pytest

import resnet_jax
from resnet_jax.config import resolve
from resnet_jax.errors import UserError
from resnet_jax.workdir import Workdir
from tests.conftest import make_console, make_tiny_config

ROW = {"step": 4, "epoch": 1.0, "learning_rate": 0.1, "train_loss": 0.5, "seconds": 2.0}
ROW |= {"train_error": 0.25, "test_error": 0.5, "test_errors": 5, "test_count": 10}
RESULT = dict.fromkeys(("model", "data", "command", "finished"), "a name")
RESULT |= {
    name: ROW[name] for name in ROW if name not in ("learning_rate", "train_loss")
}
RESULT |= dict.fromkeys(("parameters", "multiply_adds", "seed"), 1)
RESULT |= {"training_examples": 20, "global_batch_size": 5, "environment": {"jax": "1"}}
SEEDS = RESULT | {"summary": "50 %", "runs": {"seed-0": RESULT}, "failures": {}}


@pytest.fixture
def workdir(tmp_path):
    """A finished run, made up."""
    folder = Workdir(tmp_path / "run")
    folder.create()
    folder.write_config(resolve(make_tiny_config("unused")), "resnet-jax train")
    folder.write_rows([ROW, ROW | {"step": 8}])
    folder.write_result(RESULT)
    return folder.path


def without(content, name):
    return {key: value for key, value in content.items() if key != name}


DAMAGES = {
    "config.json": [
        ("{}", "config is missing, expected an object"),
        ('{"config": 1}', "config is 1"),
        ('{"config": {"modle": {"name": "x"}}}', "unknown config field modle.name"),
        ('{"config": {"seed": -1}}', "config.json: config field seed must be from 0"),
        ("[" * 100_000, "is damaged"),
        (b"\xff\xfe", "cannot be read"),
    ],
    "metrics.jsonl": [
        (None, "holds no row"),
        ("", "holds no row"),
        (json.dumps(ROW) + '\n{"step": 1\n', "line 2 is damaged"),
        (json.dumps(ROW | {"test_error": "x"}) + "\n", "test_error is 'x'"),
        (json.dumps(ROW | {"step": 10**400}) + "\n", "step is 1000"),
        (json.dumps(without(ROW, "seconds")) + "\n", "seconds is missing"),
    ],
    "result.json": [
        ("[1]", "not a JSON object"),
        (json.dumps(RESULT | {"test_count": 0}), "test_count is 0, expected a number"),
        (json.dumps(RESULT | {"seconds": float("nan")}), "seconds is nan"),
        (json.dumps(RESULT | {"images_per_second": {}}), "images_per_second is {}"),
        (json.dumps(RESULT | {"holdout_error": 0.5}), r"holdout_\w+ is missing"),
        (json.dumps(SEEDS | {"runs": {"seed-0": {}}}), "seed-0 in .* is missing"),
        *[(json.dumps(without(RESULT, name)), f"{name} is") for name in RESULT],
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        pytest.param(name, *damage, id=f"{name}-{number}")
        for name, damages in DAMAGES.items()
        for number, damage in enumerate(damages)
    ],
)
def test_a_damaged_file_is_one_sentence(workdir, name, content, sentence, console):
    file = workdir / name
    file.unlink()
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=sentence) as caught:
        resnet_jax.report(workdir, console=console)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_blank_and_cut_lines_of_metrics_do_no_harm(workdir, console):
    line = json.dumps(ROW)
    (workdir / "metrics.jsonl").write_text(f'{line}\n\n  \n{line}\n{{"step": 3')
    assert Workdir(workdir).read_rows() == [ROW, ROW]
    resnet_jax.report(workdir, console=console)
    (workdir / "report.html").read_text()


def test_the_report_of_a_finished_run_is_written_if_it_is_missing(workdir):
    config = resolve(make_tiny_config("unused"))
    assert not (workdir / "report.html").exists()
    assert resnet_jax.train(config, workdir, make_console()) == RESULT
    assert "50.00 % (5 of 10)" in (workdir / "report.html").read_text()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_pipe_cannot_hang_a_report(workdir, name, console):
    (workdir / name).unlink()
    os.mkfifo(workdir / name)
    with pytest.raises(UserError, match=f"{name} cannot be read: it is not a regular"):
        resnet_jax.report(workdir, console=console)
