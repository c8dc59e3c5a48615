import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.scripts.conftest import SCRIPTS, launch

sys.path.insert(0, str(SCRIPTS))

import launch_common

TPU = ["--name", "run1", "--zone", "us-east5-a", "--accelerator", "v5litepod-16"]
SLURM = shlex.split("--name run1 --nodes 2 --gpus-per-node 8 --time 24:00:00")
JOBSET = shlex.split("jobset --name run1 --hosts 2 --gpus-per-host 8 --image i")
BUCKET = ["--workdir", "gs://bucket/run1"]


@pytest.mark.parametrize(
    ("script", "own"),
    [
        ("launch_tpu.py", TPU),
        ("launch_gke.py", JOBSET),
        ("launch_slurm.py", SLURM),
    ],
)
@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ([], "-- is missing"),
        (["train", *BUCKET], "-- is missing"),
        (["--"], "nothing stands after --"),
        (["--", "summary"], "summary does not run on many hosts"),
        (["--", "benchmark", "step"], "does not run on many hosts"),
        (["--", "train"], "needs --workdir"),
        (["--", "train", *BUCKET, "--distributed"], "leave --distributed out"),
        (["--", "evaluate", *BUCKET, "--processes=2"], "leave --processes out"),
        (["--", "train", "--workdir", "runs/one"], "gs://"),
        (["--", "train", "--workdir", "/tmp/one"], "gs://"),
        (
            ["--", "train", *BUCKET, "--config.data.path=data"],
            "--config.data.path data",
        ),
    ],
)
def test_a_fault_of_the_command_is_one_sentence(script, own, command, sentence):
    result = launch(script, [*own, "--dry-run", *command])
    assert result.returncode == 1
    assert result.stdout == ""
    assert sentence in result.stderr
    assert result.stderr.startswith(f"{script}: error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("launch_tpu.py", [*TPU, "--name", "Run_1"], "'Run_1' is not a name"),
        ("launch_tpu.py", [*TPU, "--name", "run-"], "'run-' is not a name"),
        ("launch_tpu.py", [*TPU, "--accelerator", "v9-8"], "no image is known for v9"),
        ("launch_tpu.py", [*TPU, "--accelerator", "h100"], "is not such as v5lite"),
        ("launch_tpu.py", [*TPU, "--restarts", "-1"], "not a whole number"),
        ("launch_tpu.py", [*TPU, "--poll-seconds", "0"], "not a number above 0"),
        ("launch_tpu.py", [*TPU, "--env", "A B=1"], "is not NAME=VALUE"),
        ("launch_tpu.py", [*TPU, "--spot", "--reserved"], "not allowed with"),
        ("launch_gke.py", [*JOBSET, "--name", "a" * 41], "at most 40"),
        ("launch_gke.py", [*JOBSET, "--tpu", "t"], "give --tpu and --topology"),
        ("launch_gke.py", [*JOBSET, "--volume-claim", "data"], "is not CLAIM:/FOLDER"),
        ("launch_slurm.py", [*SLURM, "--time", "a day"], "is no time limit"),
        ("launch_slurm.py", [*SLURM, "--partition", "a b"], "that sbatch minds"),
    ],
)
def test_a_fault_of_an_option_is_told(script, arguments, sentence):
    result = launch(script, [*arguments, "--dry-run", "--", "train", *BUCKET])
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("script", "own", "tool"),
    [
        ("launch_tpu.py", TPU, "gcloud"),
        ("launch_gke.py", JOBSET, "kubectl"),
        (
            "launch_gke.py",
            shlex.split("xpk --name a --cluster c --tpu-type v6e-16 --image i"),
            "xpk",
        ),
        ("launch_slurm.py", SLURM, "sbatch"),
    ],
)
def test_a_tool_that_is_missing_is_named(script, own, tool, tmp_path):
    result = launch(script, [*own, "--", "train", *BUCKET], path=str(tmp_path))
    assert result.returncode == 1
    assert f"{tool} is not installed" in result.stderr


@pytest.mark.parametrize(
    "script", ["launch_tpu.py", "launch_gke.py", "launch_slurm.py"]
)
def test_help_needs_no_command(script):
    result = launch(script, ["--help"])
    assert result.returncode == 0
    assert "-- " in result.stdout


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
def test_the_value_of_an_option(arguments, value):
    assert launch_common.option(arguments, "--workdir") == value


def test_the_shared_folder_is_one_of_whole_names():
    command = ["train", "--workdir", "/data/run"]
    launch_common.check_shared(command, mount="/data")
    with pytest.raises(launch_common.LaunchError, match="shared /dat"):
        launch_common.check_shared(command, mount="/dat")


# A run that saves for half a second when it is told to stop, and then ends with a code.
RUN = """
import signal, sys, time
def stop(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit({code})
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep({seconds})
sys.exit({code})
"""


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("code", [0, 3])
def test_what_ends_by_itself_keeps_its_exit_status(shell, code):
    program = shlex.join([sys.executable, "-c", RUN.format(code=code, seconds=0)])
    script = launch_common.saving_script(program)
    assert subprocess.run([shell, "-c", script], timeout=30).returncode == code


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize(("code", "status"), [(0, 143), (3, 3)])
def test_what_is_told_to_stop_saves_and_is_not_done(shell, code, status):
    program = shlex.join([sys.executable, "-c", RUN.format(code=code, seconds=60)])
    script = launch_common.saving_script(program)
    with subprocess.Popen(
        [shell, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "saved\n"
        assert process.wait(timeout=30) == status
        assert time.monotonic() - start < 20
