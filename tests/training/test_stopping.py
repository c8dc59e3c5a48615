"""Signals, in whole processes and at chosen moments of a run in this one."""

import os
import signal
import subprocess
import sys
import time

import pytest

import resnet_jax
from resnet_jax.errors import Preempted
from resnet_jax.training.stopping import StopSignal
from tests.conftest import HEED_CTRL_C, REPOSITORY, make_console, make_tiny_config
from tests.test_checkpoints import same
from tests.training.helpers import final_state
from tests.training.test_train import rows_of

EXACT = ("step", "train_loss", "train_error", "test_loss", "test_errors")


def exact(rows):
    return [{name: row.get(name) for name in EXACT} for row in rows]


def run_stopped(config, workdir, monkeypatch, question):
    """Runs until the run asks for the ``question``-th time whether to stop."""
    asked = []

    def stops(self):
        asked.append(None)
        return len(asked) == question

    console = make_console()
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "asked", stops)
        with pytest.raises(Preempted, match="saved at step"):
            resnet_jax.train(config, workdir, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def whole(tfds_dir, tmp_path_factory):
    """A config and the workdir of its undisturbed run.

    Evaluations after steps 3, 6, 9 and 12, checkpoints at 6 and 12.
    """
    config = make_tiny_config(tfds_dir)
    config.training.log_every_steps = 1
    config.evaluation.every_steps = 3
    config.checkpoint.every_steps = 6
    config.data.holdout_examples = 100
    config.checkpoint.best = True
    config.checkpoint.keep_last = 1
    workdir = tmp_path_factory.mktemp("whole") / "run"
    resnet_jax.train(config, workdir, make_console())
    return config, workdir


# Each step but the last asks once, and each of the 4 + 12 batches of an evaluation.
@pytest.mark.parametrize(
    ("question", "step"),
    [
        (1, 1),  # after the first step
        (5, 3),  # in an evaluation between two checkpoints
        (25, 6),  # in one that a checkpoint follows
        (70, 12),  # in the last
    ],
)
def test_stopped_anywhere_it_ends_bit_for_bit_the_same(
    whole, tmp_path, monkeypatch, console, question, step
):
    (config, undisturbed), stopped = whole, tmp_path / "stopped"
    told = run_stopped(config, stopped, monkeypatch, question)
    assert f"saved at step {step}; the same" in told
    assert (stopped / "checkpoints" / str(step)).is_dir()
    assert not (stopped / "result.json").exists()
    resnet_jax.train(config, stopped, console)
    assert exact(rows_of(stopped)) == exact(rows_of(undisturbed))
    state, content = final_state(config, stopped)
    same(state, final_state(config, undisturbed)[0])
    assert content["rows"] == rows_of(stopped)
    best = [
        resnet_jax.evaluate(run, split="holdout", checkpoint="best", console=console)
        | {"source": None}
        for run in (undisturbed, stopped)
    ]
    assert best[0] == best[1]


def start_process(workdir, tfds_dir, folder, steps=100_000):
    config_file = folder / "endless.py"
    config_file.write_text(
        "from resnet_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.model.name = 'cifar_resnet8'\n"
        f"    config.data.data_dir = {tfds_dir!r}\n"
        "    config.augmentation.pad = 1\n"
        f"    config.training.steps = {steps}\n"
        "    config.training.global_batch_size = 32\n"
        "    config.training.log_every_steps = 1\n"
        "    config.evaluation.every_steps = 100000\n"
        "    config.checkpoint.every_steps = 100000\n"
        "    return config\n"
    )
    command = [*HEED_CTRL_C, sys.executable, "-m", "resnet_jax", "train"]
    command += ["--config", str(config_file), "--workdir", str(workdir)]
    return subprocess.Popen(
        command,
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_ends_the_run(
    tmp_path, tfds_dir, monkeypatch, number, status
):
    workdir = tmp_path / "run"
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # lacks the dots of a row
    process = start_process(workdir, tfds_dir, tmp_path)
    metrics = workdir / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and metrics.stat().st_size > 0)
    # As GNU timeout does: to the process, and again to its group.
    process.send_signal(number)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    step = rows_of(workdir)[-1]["step"]
    name = signal.Signals(number).name
    assert f"stopped by {name} and saved at step {step}; the same" in output
    assert "Traceback" not in output
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(step)]


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, tfds_dir):
    workdir = tmp_path / "run"
    process = start_process(workdir, tfds_dir, tmp_path)
    # Written after the data are open; the step is compiled from then on.
    wait_for(process, (workdir / "config.json").exists)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "SIGTERM" in output
    assert "Traceback" not in output


STOPS_BADLY = """
import hashlib
from resnet_jax.training.stopping import StopSignal
with StopSignal(lambda text: print(text, flush=True)) as stop:
    stop.steps_were_made()
    print("ready", flush=True)
    # Python's own handlers wait for this, ten minutes and more; as for a compiler.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_a_second_signal_ends_a_busy_process_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS_BADLY],
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert "finishes its step and saves" in process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped at once by a second SIGTERM" in output


def test_a_process_with_its_own_handler_keeps_it():
    def own(*_):
        raise AssertionError

    previous = signal.signal(signal.SIGTERM, own)
    try:
        with StopSignal(print) as stop:
            assert signal.getsignal(signal.SIGTERM) is own
            assert not stop.asked()
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, previous)
