import json
import re
import shlex
import signal
import subprocess
import sys

import pytest

from tests.launch.conftest import LAUNCH, launch

OWN = shlex.split("--name run1 --zone us-east5-a --accelerator v5litepod-16")
QUICK = ["--poll-seconds", "0.1"]
COMMAND = shlex.split(
    "train --config configs/imagenet.py:resnet50 --workdir gs://bucket/run1 "
    "--config.data.path=gs://bucket/data '--config.data.train_split=train[:9 %]'"
)


def dry_run(*own, command=COMMAND):
    result = launch("tpu", [*OWN, *own, "--dry-run", "--", *command])
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_dry_run_prints_a_script_with_all_that_was_asked_for():
    script = dry_run(
        *shlex.split("--spot --service-account a@b --internal-ip --project lab"),
        *shlex.split("--accelerator v6e-64 --runtime-version mine --env 'A=b c'"),
    )
    assert not re.search("@[A-Z_]+@", script)
    subprocess.run(["bash", "-n", "-c", script], check=True)
    assert (
        '--node-id="$name" --accelerator-type=v6e-64 --runtime-version=mine --spot '
        "--internal-ips --service-account=a@b --quiet" in script
    )
    assert "name=run1\n" in script
    assert "where=(--zone=us-east5-a --project=lab)" in script
    assert "connection=(--internal-ip)" in script
    assert "--spot" not in dry_run()


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["train", "--workdir", "/shared/run"], "must be gs://BUCKET/FOLDER"),
        (["train", "--workdir", "gs://bucket"], "must be gs://BUCKET/FOLDER"),
        (
            ["train", "--workdir", "gs://b/r", "--config.data.path=/data"],
            "--config.data.path /data must be",
        ),
        (
            ["train", "--workdir", "gs://b/r", "--config", "/etc/hostname"],
            "not a file of this repository",
        ),
        (
            ["train", "--workdir", "gs://b/r", "--config", "configs/none.py"],
            "not a file of this repository",
        ),
    ],
)
def test_what_hosts_cannot_reach_is_refused(command, sentence):
    result = launch("tpu", [*OWN, "--dry-run", "--", *command])
    assert result.returncode == 1
    assert sentence in result.stderr
    assert result.stdout == ""


# A cloud of one host in a folder. What its slices do, one after the other, is in
# plan.json; the scripts for hosts are really run there.
GCLOUD = """#!{python}
import json, os, pathlib, shutil, signal, subprocess, sys

cloud = pathlib.Path({cloud!r})
home, state, groups = cloud / "home", cloud / "state", cloud / "groups"
arguments = sys.argv[1:]
with open(cloud / "calls", "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
words = arguments[:4]
if words[:2] == ["storage", "ls"]:
    sys.exit(not (cloud / "result.json").exists())
if words[2:] == ["queued-resources", "create"]:
    plan = json.loads((cloud / "plan.json").read_text())
    (cloud / "now.json").write_text(json.dumps(plan.pop(0)))
    (cloud / "plan.json").write_text(json.dumps(plan))
    home.mkdir()
    state.write_text("WAITING_FOR_RESOURCES\\nACTIVE\\n")
elif words[3] == "describe":
    if not state.exists():
        sys.exit("ERROR: NOT_FOUND: Resource was not found.")
    first, *others = state.read_text().splitlines()
    print(first)
    state.write_text("\\n".join(others or [first]) + "\\n")
elif words[3] == "delete":
    state.unlink()
    for group in groups.read_text().split() if groups.exists() else ():
        try:
            os.killpg(int(group), signal.SIGKILL)
        except ProcessLookupError:
            pass
    groups.unlink(missing_ok=True)
    shutil.rmtree(home)
elif words[3] == "scp":
    shutil.copy(arguments[4], home / arguments[5].split(":")[1])
elif words[3] == "ssh":
    script = next(x for x in arguments if x.startswith("--command="))
    environment = {{"HOME": str(home), "PATH": {host_path!r} + ":/usr/bin:/bin"}}
    script = script.removeprefix("--command=")
    host = subprocess.Popen(
        ["bash", "-c", script], env=environment, cwd=home, start_new_session=True
    )
    with open(groups, "a") as file:
        file.write(f"{{host.pid}}\\n")
    sys.exit(host.wait())
"""
# pip, uv and, once it is installed, resnet-jax of a host.
HOST_PYTHON = """#!/bin/sh
case "$*" in
  *"uv venv"*) mkdir -p .venv/bin && cp {host}/resnet-jax .venv/bin/ ;;
  *"uv pip install"*) test -f pyproject.toml && test -x .venv/bin/resnet-jax ;;
esac
"""
RESNET_JAX = """#!{python}
import json, os, pathlib, signal, sys, time

cloud = pathlib.Path({cloud!r})
with open(cloud / "runs", "a") as runs:
    runs.write(json.dumps(sys.argv[1:]) + "\\n")
def stop(*_):
    time.sleep(0.3)
    os.write(1, b"saved\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
now = json.loads((cloud / "now.json").read_text())
print("step 1 of", os.environ.get("WHO"), flush=True)
if "states" in now:
    (cloud / "state").write_text("\\n".join(now["states"]) + "\\n")
if now.get("done"):
    (cloud / "result.json").write_text("{{}}")
time.sleep(now.get("seconds", 0))
sys.exit(now.get("code", 0))
"""


class Cloud:
    def __init__(self, folder, tools):
        self.folder = folder
        host = folder / "host"
        host.mkdir()
        fill = {"python": sys.executable, "cloud": str(folder), "host": str(host)}
        for name, text in [("python3", HOST_PYTHON), ("resnet-jax", RESNET_JAX)]:
            (host / name).write_text(text.format(**fill))
            (host / name).chmod(0o755)
        tool = tools("gcloud", GCLOUD.format(**fill, host_path=str(host)))
        self.path = f"{tool}:/usr/bin:/bin"

    def plan(self, *slices):
        (self.folder / "plan.json").write_text(json.dumps(slices))

    def launch(self, *own, command=COMMAND):
        arguments = [*OWN, *QUICK, *own, "--", *command]
        return launch("tpu", arguments, path=self.path)

    def calls(self, name):
        lines = (self.folder / "calls").read_text().splitlines()
        return [call for call in map(json.loads, lines) if name in call[:4]]

    def runs(self):
        runs = self.folder / "runs"
        lines = runs.read_text().splitlines() if runs.exists() else []
        return [json.loads(line) for line in lines]

    def has_slice(self):
        return (self.folder / "state").exists()


@pytest.fixture
def cloud(tmp_path, tools):
    folder = tmp_path / "cloud"
    folder.mkdir()
    return Cloud(folder, tools)


def test_a_run_from_the_first_to_the_last_step(cloud):
    cloud.plan({"done": True})
    result = cloud.launch("--env", "WHO=a b")
    assert result.returncode == 0, result.stderr
    assert cloud.runs() == [[*COMMAND, "--distributed"]]
    for call in cloud.calls("queued-resources") + cloud.calls("tpu-vm"):
        assert call[4] == "run1" or call[3] == "scp"
        assert "--zone=us-east5-a" in call
        assert "--quiet" in call or call[3] == "describe"
        assert "--worker=all" in call or call[2] == "queued-resources"
    # The log of the host is seen, and its environment is what was asked for.
    assert "step 1 of a b" in result.stdout
    assert "WAITING_FOR_RESOURCES" in result.stderr
    assert not cloud.has_slice()


def test_a_run_that_fails_says_how_and_leaves_no_slice(cloud):
    cloud.plan({"code": 3})
    result = cloud.launch("--restarts", "5")
    assert result.returncode == 3
    assert len(cloud.runs()) == 1
    assert not cloud.has_slice()


def test_keep_leaves_the_slice_of_a_real_run(cloud):
    cloud.plan({"done": True})
    assert cloud.launch("--keep").returncode == 0
    assert cloud.has_slice()


@pytest.mark.parametrize(
    "preempted",
    [
        {"code": 1, "states": ["SUSPENDED"]},
        # The state lags behind what the run has seen.
        {"code": 1, "states": ["ACTIVE", "SUSPENDING", "SUSPENDED"]},
        # SIGTERM in time: the run saved and exits 0, without a result.
        {"code": 0, "states": ["SUSPENDED"]},
    ],
)
def test_a_preempted_slice_is_asked_for_again(cloud, preempted):
    cloud.plan(preempted, {"done": True})
    result = cloud.launch("--spot", "--restarts", "1")
    assert result.returncode == 0, result.stderr
    assert cloud.runs() == [[*COMMAND, "--distributed"]] * 2
    assert "restart 1 of 1" in result.stderr
    assert len(cloud.calls("create")) == len(cloud.calls("delete")) == 2
    assert not cloud.has_slice()


def test_restarts_have_an_end(cloud):
    cloud.plan(*[{"code": 1, "states": ["SUSPENDED"]}] * 2)
    result = cloud.launch("--restarts", "1")
    assert result.returncode == 1
    assert "preempted, and --restarts 1 allows no further" in result.stderr
    assert len(cloud.runs()) == 2
    assert not cloud.has_slice()


def test_an_evaluation_that_exits_0_is_done(cloud):
    cloud.plan({"code": 0})
    command = ["evaluate", "--workdir", "gs://bucket/run1"]
    assert cloud.launch(command=command).returncode == 0
    assert cloud.runs() == [[*command, "--distributed"]]


def test_a_request_that_failed_is_told_and_taken_back(cloud):
    (cloud.folder / "state").write_text("ACCEPTED\nFAILED\n")
    (cloud.folder / "home").mkdir()
    result = cloud.launch()
    assert result.returncode == 1
    assert "run1: error: the request failed" in result.stderr
    assert not cloud.has_slice()
    assert cloud.runs() == []


def test_gcloud_that_cannot_tell_is_told_and_nothing_is_deleted(cloud, tools):
    tools(
        "gcloud",
        f"#!/bin/sh\necho $4 >> {cloud.folder}/verbs\necho no login >&2\nexit 1\n",
    )
    result = cloud.launch()
    assert result.returncode == 1
    assert "gcloud does not report the state of the slice: no login" in result.stderr
    assert set((cloud.folder / "verbs").read_text().split()) == {"describe"}


def test_interrupted_the_run_saves_before_the_slice_goes(cloud):
    cloud.plan({"seconds": 60})
    arguments = [*OWN, *QUICK, "--", *COMMAND]
    with subprocess.Popen(
        [*LAUNCH, "tpu", *arguments],
        env={"PATH": cloud.path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert "step 1" in process.stdout.readline()
        log = cloud.folder / "home" / "resnet_jax" / "run.log"
        text = []
        # The log is on the host, which goes; a link to it stays.
        kept = cloud.folder / "kept.log"
        kept.hardlink_to(log)
        process.send_signal(signal.SIGTERM)
        text.append(process.stderr.read())
        assert process.wait(timeout=60) == 130
    assert "interrupted: the run saves a checkpoint" in text[0]
    assert "saved" in kept.read_text()
    assert not cloud.has_slice()


def test_a_launcher_that_was_killed_finds_its_run_again(cloud):
    cloud.plan({"seconds": 2, "done": True})
    arguments = [*OWN, *QUICK, "--", *COMMAND]
    with subprocess.Popen(
        [*LAUNCH, "tpu", *arguments],
        env={"PATH": cloud.path},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert "step 1" in process.stdout.readline()
        process.kill()
    assert cloud.has_slice()
    result = cloud.launch()
    assert result.returncode == 0, result.stderr
    assert "step 1" in result.stdout
    assert len(cloud.runs()) == len(cloud.calls("create")) == 1
    assert not cloud.has_slice()


def test_each_accelerator_has_its_image():
    for accelerator, image in [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ]:
        script = dry_run("--accelerator", accelerator)
        assert f"--runtime-version={image}" in script
