import re
import shlex
import signal
import subprocess
import sys

import pytest

from tests.launch.conftest import launch

OWN = shlex.split("--name run1 --nodes 4 --gpus-per-node 8 --time 1-00:00:00")
COMMAND = ["train", "--config", "configs/imagenet.py:resnet50"]
COMMAND += ["--workdir", "/shared/a run", "--config.seed=1"]


def batch_script(tmp_path, *own):
    file = tmp_path / "run.sbatch"
    result = launch("slurm", [*OWN, *own, "--dry-run", "--", *COMMAND])
    assert result.returncode == 0, result.stderr
    file.write_text(result.stdout)
    return file


def directives(file):
    lines = re.findall(r"^#SBATCH --(.*)$", file.read_text(), re.MULTILINE)
    return dict(line.partition("=")[::2] for line in lines)


def srun(file):
    line = next(x for x in file.read_text().splitlines() if x.startswith("srun"))
    assert line.endswith(" &")
    return shlex.split(line.removesuffix(" &"))


def test_a_process_for_every_gpu_and_all_gpus_for_every_process(tmp_path):
    found = directives(batch_script(tmp_path))
    assert found["nodes"] == "4"
    assert found["ntasks-per-node"] == found["gpus-per-node"] == "8"
    # These would hide GPUs from processes, which jax then cannot count.
    assert not {"gpus-per-task", "gpu-bind", "ntasks"} & set(found)
    assert found["time"] == "1-00:00:00"


def test_the_command_is_passed_on_whole(tmp_path):
    arguments = srun(batch_script(tmp_path))
    at = arguments.index("resnet-jax")
    assert arguments[at + 1 :] == [*COMMAND, "--distributed"]


def test_options_become_directives(tmp_path):
    file = batch_script(
        tmp_path,
        *shlex.split(
            "--partition gpu --account lab --cpus-per-task 12 --grace-seconds 300"
        ),
        *shlex.split("--restarts 3 --env XLA_FLAGS=--a=1 --setup"),
        "module load cuda",
    )
    found = directives(file)
    assert found["partition"] == "gpu"
    assert found["account"] == "lab"
    assert found["cpus-per-task"] == "12"
    assert found["signal"] == "B:USR1@300"
    assert "requeue" in found
    assert "--cpus-per-task=12" in srun(file)
    lines = file.read_text().splitlines()
    assert lines.index("module load cuda") < lines.index("export XLA_FLAGS=--a=1")


def test_without_restarts_nothing_is_queued_again(tmp_path):
    assert "no-requeue" in directives(batch_script(tmp_path))


def test_bash_reads_the_script(tmp_path):
    file = batch_script(tmp_path, "--restarts", "2", "--env", "A=it's")
    subprocess.run(["bash", "-n", file], check=True)


def test_sbatch_gets_the_script_and_its_failure_is_reported(tmp_path, tools):
    path = tools("sbatch", f'#!/bin/sh\necho "$@"; cat > {tmp_path}/got\n')
    result = launch("slurm", [*OWN, "--", *COMMAND], path=f"{path}:/usr/bin:/bin")
    assert result.returncode == 0
    assert result.stdout == "--parsable\n"
    assert (tmp_path / "got").read_text() == batch_script(tmp_path).read_text()
    tools("sbatch", "#!/bin/sh\nexit 1\n")
    result = launch("slurm", [*OWN, "--", *COMMAND], path=f"{path}:/usr/bin:/bin")
    assert result.returncode == 1
    assert "failed with exit status 1" in result.stderr


# In the place of Slurm: srun runs one process, scancel signals it.
SRUN = """#!/bin/sh
exec {python} -c '
import os, signal, sys, time
def stop(*_):
    time.sleep(0.3)
    os.write(1, b"saved\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
open("{folder}/pid", "w").write(str(os.getpid()))
print("ready", flush=True)
time.sleep({seconds})
sys.exit({code})
'
"""


@pytest.fixture
def slurm(tmp_path, tools):
    """A function that runs the script with stand-ins, and signals it once it runs."""

    def run(*own, seconds=60, code=0, signals=(), restarted=0):
        fill = {"python": sys.executable, "folder": tmp_path}
        path = tools("srun", SRUN.format(**fill, seconds=seconds, code=code))
        scancel = f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        tools("scancel", scancel + f'kill -TERM "$(cat {tmp_path}/pid)"\n')
        tools("scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
        environment = {"PATH": f"{path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
        environment["SLURM_RESTART_COUNT"] = str(restarted)
        with subprocess.Popen(
            ["bash", batch_script(tmp_path, *own)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout.readline() == "ready\n"
            for number in signals:
                process.send_signal(number)
            output = process.stdout.read()
            status = process.wait(timeout=30)
        calls = tmp_path / "calls"
        made = calls.read_text().splitlines() if calls.exists() else []
        return status, output, made

    return run


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_that_ends_by_itself_is_not_queued_again(slurm, code):
    assert slurm("--restarts", "2", seconds=0, code=code) == (code, "", [])


def test_before_its_limit_a_job_saves_and_is_queued_again(slurm):
    status, output, calls = slurm("--restarts", "2", signals=[signal.SIGUSR1])
    assert (status, output) == (0, "saved\n")
    assert calls == ["--signal=TERM 7", "requeue Incomplete 7"]


def test_restarts_have_an_end(slurm):
    status, _, calls = slurm("--restarts", "2", signals=[signal.SIGUSR1], restarted=2)
    assert status == 0
    assert calls == ["--signal=TERM 7"]


def test_a_preemption_that_slurm_tells_the_run_is_not_told_again(slurm, tmp_path):
    # Slurm sends SIGTERM to the script and to the run; a second one would end the run.
    status, _, calls = slurm("--restarts", "2", signals=[signal.SIGTERM], seconds=1)
    assert status == 0
    assert calls == ["requeue Incomplete 7"]
