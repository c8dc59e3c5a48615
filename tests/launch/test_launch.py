import importlib.util
import shlex
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.launch.conftest import launch

TPU = ["--name", "run1", "--zone", "us-east5-a", "--accelerator", "v5litepod-16"]
SLURM = shlex.split("--name run1 --nodes 2 --gpus-per-node 8 --time 24:00:00")
GKE = shlex.split("--name run1 --hosts 2 --gpus-per-host 8 --image i")
BUCKET = ["--workdir", "gs://bucket/run1"]


@pytest.fixture(scope="module")
def launcher():
    """launch.py as a module: in this process, refusals cost no interpreter."""
    file = REPOSITORY / "launch" / "launch.py"
    spec = importlib.util.spec_from_file_location("launcher", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "own"), [("tpu", TPU), ("gke", GKE), ("slurm", SLURM)]
)
@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ([], "command is missing"),
        (["--"], "command is missing"),
        (["--", "summary"], "summary does not run on several hosts"),
        (["--", "benchmark", "step"], "does not run on several hosts"),
        (["--", "train"], "needs --workdir"),
        (["--", "train", *BUCKET, "--distributed"], "leave --distributed out"),
        (["--", "evaluate", *BUCKET, "--processes=2"], "leave --processes out"),
        (["--", "train", "--workdir", "runs/one"], "--workdir runs/one must be gs://"),
        (["--", "train", "--workdir", "/tmp/one"], "--workdir /tmp/one must be gs://"),
        (
            ["--", "train", *BUCKET, "--config.data.path=data"],
            "--config.data.path data",
        ),
    ],
)
def test_a_command_that_cannot_run_is_refused(
    launcher, capsys, kind, own, command, sentence
):
    with pytest.raises(SystemExit, match=sentence) as refused:
        launcher.main([kind, *own, "--dry-run", *command])
    assert refused.value.code.startswith("launch.py: error: ")
    assert "\n" not in refused.value.code
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("kind", "arguments", "sentence"),
    [
        ("tpu", [*TPU, "--name", "Run_1"], "'Run_1' is not a name"),
        ("tpu", [*TPU, "--name", "run-"], "'run-' is not a name"),
        ("tpu", [*TPU, "--name", "a" * 41], "at most 40"),
        ("tpu", [*TPU, "--accelerator", "h100"], "is not such as v5lite"),
        ("tpu", [*TPU, "--restarts", "-1"], "not a whole number"),
        ("tpu", [*TPU, "--poll-seconds", "0"], "'0' is not above 0"),
        ("tpu", [*TPU, "--env", "A B=1"], "is not NAME=VALUE"),
        ("tpu", [*TPU, "--spot", "--reserved"], "exclude each other"),
        ("gke", [*GKE, "--volume-claim", "data"], "is not CLAIM:/FOLDER"),
        ("gke", [*GKE, "--topology", "4"], "is not such as 4x4"),
        ("gke", [*GKE, "--topology", "0x4"], "is not such as 4x4"),
        ("gke", [*GKE, "--topology", "4x4x4x4"], "is not such as 4x4"),
        ("slurm", [*SLURM, "--time", "a day"], "is not such as 24:00:00"),
        ("slurm", [*SLURM, "--partition", "a b"], "is not a word"),
        ("local", ["--processes", "0"], "whole number of at least 1"),
    ],
)
def test_a_wrong_option_is_refused(launcher, capsys, kind, arguments, sentence):
    with pytest.raises(SystemExit) as refused:
        launcher.main([kind, *arguments, "--", "train", *BUCKET])
    assert refused.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "own", "tool"),
    [("tpu", TPU, "gcloud"), ("gke", GKE, "kubectl"), ("slurm", SLURM, "sbatch")],
)
def test_a_missing_tool_is_named(launcher, monkeypatch, tmp_path, kind, own, tool):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=f"{tool} is not installed"):
        launcher.main([kind, *own, "--", "train", *BUCKET])


def test_it_runs_as_a_script_on_the_standard_library():
    result = launch("--help", [])
    assert result.returncode == 0
    assert "-- " in result.stdout
    result = launch("tpu", TPU)
    assert result.returncode == 1
    assert result.stderr.startswith("launch.py: error: ")


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["train", "--workdir", "a"], "a"),
        (["train", "--workdir=a"], "a"),
        (["train", "--workdir", "a", "--workdir=b"], "b"),
        (["train", "--workdir"], None),
        (["train", "--workdirs=a"], None),
    ],
)
def test_the_value_of_an_option(launcher, arguments, value):
    assert launcher.option(arguments, "--workdir") == value


def test_a_folder_is_matched_by_whole_names(launcher):
    assert launcher.is_inside("/data/run", "/data")
    assert launcher.is_inside("/data", "/data")
    assert not launcher.is_inside("/data/run", "/dat")
    assert not launcher.is_inside("/data/../run", "/data")


@pytest.mark.parametrize(
    ("codes", "status"), [((0, 0), 0), ((0, 3), 3), ((4, 0), 4), ((0, -9), 137)]
)
def test_the_status_of_local_processes_is_that_of_the_first_failure(
    launcher, monkeypatch, codes, status
):
    started = []
    popen = launcher.subprocess.Popen

    def start(program, env):
        index = len(started)
        assert program[-1] == f"--process-id={index}"
        assert env["CUDA_VISIBLE_DEVICES"] == str(index)
        end = f"import os, sys; c = {codes[index]}; os.kill(os.getpid(), 9) if c < 0 "
        started.append(popen([sys.executable, "-c", f"{end} else sys.exit(c)"]))
        return started[-1]

    monkeypatch.setattr(launcher.subprocess, "Popen", start)
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    assert launcher.main(["local", "--gpu", "--", "train"]) == status
