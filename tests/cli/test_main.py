import json
import os
import subprocess
import sys

import pytest

import resnet_jax
from resnet_jax.cli import main
from resnet_jax.cli.overrides import parse_overrides
from resnet_jax.config import fields, list_configs, load_config
from resnet_jax.errors import UserError
from tests.conftest import REPOSITORY

DIGITS = str(REPOSITORY / "configs" / "digits.py")


def run(capsys, *arguments):
    status = main(arguments)
    return status, *capsys.readouterr()


def test_overrides_with_an_equals_sign_or_a_space():
    arguments = [
        "--config.model.name=resnet18",
        "--config.seed",
        "1",
        "--config.data.path=",
    ]
    assert parse_overrides(arguments) == {
        "model.name": "resnet18",
        "seed": "1",
        "data.path": "",
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--confg.seed=1"], "unknown argument"), (["--config.seed"], "needs a value")],
)
def test_other_arguments_are_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_overrides(arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "configs/none.py"], "configs/none.py does not exist"),
        (["--config", DIGITS, "--config.optimizer.learning_rat=1"], "did you mean"),
        (
            ["--config", DIGITS, "--config.optimizer.learning_rate=fast"],
            "takes a number",
        ),
        (["--config", DIGITS, "--config.training.epochs=3"], "exclude each other"),
        (
            ["--config", DIGITS, "--config.data.path=/nowhere"],
            "/nowhere does not exist",
        ),
        (["--config", f"{DIGITS}:resnet51"], "did you mean resnet50"),
        ([], "give --config NAME or FILE.py"),
        (["--config", "digit"], "did you mean digits?"),
        (["--config", DIGITS, "--config.seed", "x"], "--config.seed takes an integer"),
        (["--config", "rsb_a3"], "did you mean recipes/rsb_a3?"),
        (["--config", "folder"], "set --config.data.path to a folder"),
    ],
)
def test_train_says_in_one_sentence_what_is_wrong(
    tmp_path, capsys, arguments, sentence
):
    workdir = tmp_path / "run"
    status, _, err = run(capsys, "train", "--workdir", str(workdir), *arguments)
    assert status == 1
    assert err.startswith("resnet-jax: error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert not (workdir / "checkpoints").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("trian", "resnet-jax: error: there is no command trian; did you mean train?"),
        ("paper rum", "paper: error: there is no action rum; did you mean run?"),
        ("train --confg=digits", "unknown flag --confg; did you mean --config?"),
        ("train --lr 1", "--lr; did you mean --config.optimizer.learning_rate?"),
        ("train --steps 4", "--steps; did you mean --config.training.steps?"),
        ("-v", "resnet-jax: error: unknown flag -v; see resnet-jax --help"),
        ("plan --batch-size=8", "did you mean --config.training.global_batch_size?"),
        ("sweep --confg.seed=1", "did you mean --config.seed?"),
        ("evaluate --workdr x", "unknown flag --workdr; did you mean --workdir?"),
        ("prepare a b --shard 2", "unknown flag --shard; did you mean --shards?"),
        ("report --zzzzzz", "unknown flag --zzzzzz; see resnet-jax report --help"),
        ("report --workdir a b", "resnet-jax: error: unknown argument b"),
    ],
)
def test_typos_get_a_suggestion(capsys, line, sentence):
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


def test_an_override_with_a_space_may_come_before_other_arguments(capsys):
    line = ["paper", "run", "--config.seed", "3", "figure99", "--workdir", "x"]
    status, _, err = run(capsys, *line)
    assert (status, "unknown experiment 'figure99'" in err) == (1, True)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"resnet_jax {resnet_jax.__version__} ")


def test_configs_are_known_by_name_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["configs"]) == 0
    listed = capsys.readouterr().out
    for name, first_line in list_configs().items():
        assert name in listed
        assert first_line.split()[0] in listed
    named = load_config("degradation:cifar_plain56")
    for other in (
        "configs/degradation.py",
        "degradation.py",
    ):
        assert load_config(f"{other}:cifar_plain56") == named
    assert main(["configs", "digits"]) == 0
    assert "--config digits --workdir" in capsys.readouterr().out
    # A file in this folder comes first.
    (tmp_path / "digits.py").write_text("def get_config(): return 1 / 0")
    with pytest.raises(UserError, match=r"digits.py, line 1: ZeroDivisionError"):
        load_config("digits.py")
    assert load_config("digits").data.name == "digits"


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, field in fields().items():
        assert f"  {name} = {field.default}  (" in text
        assert field.meaning.split()[0] in text


@pytest.mark.parametrize(
    "command", [["evaluate"], ["report"], ["benchmark"], ["benchmark", "step"]]
)
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: resnet-jax" in capsys.readouterr().out


def test_train_and_evaluate_from_the_command_line(tmp_path, tfds_dir, capsys):
    workdir = tmp_path / "run"
    arguments = [
        "train", "--workdir", str(workdir), "--config", f"{DIGITS}:cifar_plain8",
        f"--config.data.data_dir={tfds_dir}", "--config.training.steps=4",
        "--config.training.global_batch_size=16", "--config.schedule.warmup_steps=1",
    ]  # fmt: skip
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    assert "test error " in out
    last_lines = [line for line in out.splitlines() if line.startswith("test error")]
    status, out, _ = run(capsys, "evaluate", "--workdir", str(workdir))
    assert status == 0
    assert out.splitlines()[-1] == last_lines[-1]
    # Without --config the workdir's own config is taken.
    status, out, _ = run(capsys, "train", "--workdir", str(workdir))
    assert status == 0
    assert "nothing to do" in out


def test_benchmark_step_prints_and_writes_its_figures(tmp_path, capsys):
    file = tmp_path / "step.json"
    status, out, _ = run(
        capsys, "benchmark", "step", "--model", "cifar_resnet8", "--batch", "8",
        "--image-size", "8", "--steps", "2", "--json", str(file),
    )  # fmt: skip
    assert status == 0
    for figure in (
        "images per second",
        "milliseconds",
        "compile seconds",
        "peak bytes",
        "multiply adds per second",
    ):
        assert figure in out
    result = json.loads(file.read_text())
    seconds = result["milliseconds"] / 1000
    assert result["images_per_second"] == pytest.approx(8 / seconds)
    # 8 x 8 pixels: stem 3*9*16, then 2 convolutions of 16, 32 and 64 channels.
    first, second, third = 64 * 9 * 16 * 16, 16 * 9, 4 * 9
    forward = (
        64 * 9 * 3 * 16
        + 2 * first
        + second * (16 * 32 + 32 * 32)
        + third * (32 * 64 + 64 * 64)
        + 64 * 10
    )
    assert result["multiply_adds_per_second"] == pytest.approx(
        3 * forward * 8 / seconds
    )


LATE_ANSWER = """
import asyncio
import tensorstore
from resnet_jax.cli import main

class Broken:
    def __del__(self):
        raise ValueError("another fault")

async def wait():
    await future

main(["report", "--workdir", "/nowhere"])
promise, future = tensorstore.Promise.new()
loop = asyncio.new_event_loop()
task = loop.create_task(wait())
loop.run_until_complete(asyncio.sleep(0.1))
loop.close()
promise.set_result(1)
Broken()
"""


def test_a_write_that_ends_after_a_failed_save_prints_no_traceback():
    """But all other faults that Python can only print are printed."""
    result = subprocess.run(
        [sys.executable, "-c", LATE_ANSWER],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY)),
        timeout=60,
    )
    assert result.returncode == 0
    assert "Event loop is closed" not in result.stderr
    assert "ValueError: another fault" in result.stderr
