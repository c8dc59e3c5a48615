"""Real processes over loopback, as launch/launch.py starts them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from resnet_jax.cli import main
from resnet_jax.distributed import Processes
from resnet_jax.errors import UserError
from tests.conftest import REPOSITORY, write_image_folder
from tests.evaluation.test_evaluate import SIZE, save_net
from tests.test_checkpoints import same
from tests.training.helpers import final_state, plain_arrays
from tests.training.test_train import rows_of

LAUNCH = [sys.executable, str(REPOSITORY / "launch" / "launch.py"), "local"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, tfds_dir):
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    file.write_text(
        "from resnet_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.model.name = 'cifar_resnet8'\n"
        f"    config.data.data_dir = {tfds_dir!r}\n"
        "    config.augmentation.pad = 1\n"
        "    config.training.steps = 12\n"
        "    config.training.global_batch_size = 32\n"
        "    config.training.log_every_steps = 1\n"
        "    config.evaluation.every_steps = 12\n"
        "    config.checkpoint.every_steps = 3\n"
        "    config.parallel.peer_timeout_seconds = 3\n"
        "    return config\n"
    )
    return file


def environment(**variables):
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}


def train(config_file, workdir, *overrides):
    flags = ["--config", str(config_file), "--workdir", str(workdir)]
    return ["train", *flags, *overrides]


def run_alone(config_file, workdir, devices):
    """One process with simulated devices."""
    command = [sys.executable, "-m", "resnet_jax", *train(config_file, workdir)]
    variables = environment(JAX_NUM_CPU_DEVICES=str(devices), JAX_PLATFORMS="cpu")
    subprocess.run(command, check=True, env=variables, stdout=subprocess.DEVNULL)


def start(config_file, workdir, processes):
    """Several processes with one device each."""
    command = [*LAUNCH, f"--processes={processes}", "--"]
    return subprocess.Popen(
        [*command, *train(config_file, workdir)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_rows(launcher, workdir, count):
    metrics = workdir / "metrics.jsonl"
    while launcher.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run ended early: {launcher.communicate()[0]}")


def process_of(launcher, index):
    """The number of a process that the launcher started."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(launcher.pid)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (line,) = (line for line in listed.splitlines() if f"--process-id={index}" in line)
    return int(line.split()[0])


@pytest.fixture(scope="module")
def alone(config_file, tmp_path_factory):
    """The workdir of one process with two devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run_alone(config_file, workdir, devices=2)
    return workdir


def load(config_file):
    import resnet_jax

    return resnet_jax.load_config(str(config_file))


def assert_ends_as(alone, workdir, config_file):
    """Bit for bit, with the same rows and the same result."""
    config = load(config_file)
    (a, _), (b, content) = final_state(config, alone), final_state(config, workdir)
    same(a, b)
    assert [row["step"] for row in rows_of(workdir)] == list(range(1, 13))
    assert content["rows"] == rows_of(workdir)
    results = [
        json.loads((run / "result.json").read_text()) for run in (alone, workdir)
    ]
    for name in ("test_errors", "test_count", "test_loss", "train_error"):
        assert results[0][name] == results[1][name]
    assert results[1]["test_count"] == 360


def test_two_processes_stopped_killed_and_started_again_end_as_one(
    config_file, alone, tmp_path
):
    """SIGTERM to one of them, SIGKILL to one of them, and then to the end."""
    workdir = tmp_path / "two"
    launcher = start(config_file, workdir, 2)
    wait_for_rows(launcher, workdir, 2)
    os.kill(process_of(launcher, 1), signal.SIGTERM)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, output
    stopped_at = rows_of(workdir)[-1]["step"]
    assert f"and saved at step {stopped_at};" in output
    assert (workdir / "checkpoints" / str(stopped_at)).is_dir()

    launcher = start(config_file, workdir, 2)
    wait_for_rows(launcher, workdir, stopped_at + 2)
    os.kill(process_of(launcher, 1), signal.SIGKILL)
    output, _ = launcher.communicate(timeout=60)
    assert f"continuing from the checkpoint at step {stopped_at}" in output
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "error: process 1 of 2 has stopped, died" in output
    assert "Traceback" not in output
    assert not (workdir / "result.json").exists()

    launcher = start(config_file, workdir, 2)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, output
    # Only the first process prints and writes.
    assert output.count("test error") == 1 + sum(
        "test_error" in r for r in rows_of(alone)
    )
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert_ends_as(alone, workdir, config_file)
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    arrays = plain_arrays(workdir / "checkpoints" / str(saved) / "state")
    same(arrays["params"], final_state(load(config_file), workdir)[0].params)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_killed(config_file, alone, tmp_path):
    workdir = tmp_path / "killed"
    launcher = start(config_file, workdir, 2)
    wait_for_rows(launcher, workdir, 5)
    os.kill(process_of(launcher, 0), signal.SIGKILL)
    launcher.communicate(timeout=60)
    run_alone(config_file, workdir, devices=2)
    assert_ends_as(alone, workdir, config_file)


# Two processes that add numbers until process 0 dies by a signal or an error.
ADD = """
import os, sys, time
from resnet_jax import distributed
from resnet_jax.errors import UserError
index = int(sys.argv[1])
processes = distributed.Processes("127.0.0.1:" + sys.argv[2], 2, index)
with distributed.started(processes, peer_timeout_seconds=3):
    while distributed.sum_over_processes(1) == 2:
        if index == 0 and sys.argv[3] == "signal":
            os.kill(os.getpid(), 9)
        if index == 0:
            raise UserError("a broken image")
"""


@pytest.mark.parametrize("way", ["signal", "error"])
def test_process_0_that_dies_is_named_by_the_others(way):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", ADD, str(index), str(port), way],
            env=environment(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    )
    _, said = second.communicate(timeout=60)
    assert second.returncode != 0
    assert said.count("resnet-jax: error: process 0 of 2") == 1
    assert "the same command on all hosts resumes the run" in said
    first.communicate(timeout=60)
    assert first.returncode != 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"coordinator": "a:1", "count": 2}, "go together"),
        ({"coordinator": "a", "count": 2, "index": 0}, "HOST:PORT of process 0"),
        ({"coordinator": "a:0", "count": 2, "index": 0}, "HOST:PORT of process 0"),
        ({"coordinator": "a:1", "count": 0, "index": 0}, "at least 1, not 0"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "one of 0 to 1, not 2"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        Processes(**flags).check()


@pytest.mark.parametrize(
    ("flags", "variables", "sentence"),
    [
        (["--processes=2"], {}, "go together"),
        (["--distributed", "--process-id=0"], {}, "but not both"),
        (
            [],
            {"JAX_NUM_PROCESSES": "two"},
            "from 1 to 1,000,000, not 'two'",
        ),
        (["--distributed"], {}, "cannot be connected"),
    ],
)
def test_faults_of_a_start_are_one_sentence(
    config_file, tmp_path, monkeypatch, capsys, flags, variables, sentence
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if flags == ["--distributed"]:
        # Out of a cluster, and in a process that has used no device yet.
        command = [sys.executable, "-m", "resnet_jax"]
        command += [*train(config_file, tmp_path / "run"), *flags]
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True
        )
        status, output = done.returncode, done.stderr
    else:
        status = main([*train(config_file, tmp_path / "run"), *flags])
        output = capsys.readouterr().err
    assert status == 1
    assert sentence in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_sums_and_numbers_of_a_lone_process():
    from resnet_jax import distributed

    assert distributed.is_primary()
    assert distributed.process_count() == 1
    assert distributed.broadcast(3) == distributed.sum_over_processes(3) == 3
    np.testing.assert_equal(distributed.wait_for_all("nobody"), None)


def test_an_evaluation_by_two_processes_has_the_same_result(tmp_path):
    net, *_ = save_net(tmp_path / "net.safetensors", 0)
    data = tmp_path / "data"
    write_image_folder(data, per_class={"test": 4}, shape=(SIZE, SIZE))
    for name in ("ant/1", "bee/2", "cat/3"):  # both processes meet broken ones
        (data / "test" / f"{name}.png").write_bytes(b"nothing")
    flags = ["--weights", net, "--data", str(data), "--config.data.on_error=skip"]
    results = []
    for command in (
        [sys.executable, "-m", "resnet_jax"],
        [*LAUNCH, "--processes=2", "--"],
    ):
        file = tmp_path / f"{len(results)}.json"
        subprocess.run(
            [*command, "evaluate", *flags, "--json", str(file)],
            check=True, env=environment(JAX_PLATFORMS="cpu"), capture_output=True,
        )  # fmt: skip
        results.append(json.loads(file.read_text()))
    alone, both = results
    assert len(alone["skipped"]) == 3
    for name in ("nets", "skipped", "data", "answers"):
        assert alone[name] == both[name]
