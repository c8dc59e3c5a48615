import json
import os
import shlex
import signal
import subprocess

import pytest

from tests.scripts.conftest import launch

COMMAND = shlex.split(
    "train --config configs/imagenet.py:resnet50 --workdir gs://bucket/run1 "
    "'--config.data.train_split=train[:9 %]'"
)
TPU = shlex.split("jobset --name run1 --image i --tpu tpu-v5-lite-podslice")
TPU += ["--topology", "4x8"]
GPU = shlex.split("jobset --name run1 --image i --hosts 3 --gpus-per-host 8")
XPK = shlex.split("xpk --name run1 --image i --cluster pods --tpu-type v5litepod-16")


def dry_run(own, command=COMMAND):
    result = launch("launch_gke.py", [*own, "--dry-run", "--", *command])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return shlex.split(result.stdout)


def manifest(own, command=COMMAND):
    words = dry_run(own, command)
    assert words[:2] == ["printf", "%s\\n"]
    assert words[3:] == ["|", "kubectl", "apply", "--filename", "-"]
    return json.loads(words[2])


def job(own):
    (replicated,) = manifest(own)["spec"]["replicatedJobs"]
    return replicated, replicated["template"]["spec"]


def pod(own):
    return job(own)[1]["template"]["spec"]


def container(own):
    (only,) = pod(own)["containers"]
    return only


def test_a_slice_is_a_job_and_a_host_a_pod():
    found = manifest([*TPU, "--slices", "2", "--restarts", "7"])
    assert (found["apiVersion"], found["kind"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
    )
    assert found["metadata"]["name"] == "run1"
    assert found["spec"]["failurePolicy"] == {"maxRestarts": 7}
    replicated, spec = job([*TPU, "--slices", "2"])
    assert replicated["replicas"] == 2
    # 4 x 8 chips, 4 to a host.
    assert spec["parallelism"] == spec["completions"] == 8
    assert spec["backoffLimit"] == 0
    assert container(TPU)["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize(
    ("topology", "chips", "hosts"),
    [("2x4", 8, 1), ("2x2x4", 4, 4), ("16x16", 4, 64)],
)
def test_hosts_follow_from_the_topology(topology, chips, hosts):
    own = [*TPU, "--topology", topology, "--chips-per-host", str(chips)]
    assert job(own)[1]["parallelism"] == hosts


@pytest.mark.parametrize("topology", ["4", "4x", "0x4", "4x4x4x4", "4 x 4"])
def test_a_topology_that_is_none_is_refused(topology):
    result = launch(
        "launch_gke.py", [*TPU, "--topology", topology, "--dry-run", "--", *COMMAND]
    )
    assert result.returncode == 2
    assert "is not such as 4x4" in result.stderr


def test_chips_that_hosts_cannot_make_up_are_refused():
    own = [*TPU, "--topology", "2x3", "--dry-run", "--", *COMMAND]
    result = launch("launch_gke.py", own)
    assert result.returncode == 1
    assert "has 6 chips" in result.stderr


def test_pods_go_to_nodes_of_their_kind():
    assert pod(TPU)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert "nodeSelector" not in pod(GPU)
    spot = pod([*GPU, "--spot", "--gpu-label", "nvidia-h100-80gb"])
    assert spot["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
        "cloud.google.com/gke-spot": "true",
    }
    assert [t["key"] for t in spot["tolerations"]] == [
        "nvidia.com/gpu",
        "cloud.google.com/gke-spot",
    ]
    assert [t["key"] for t in pod(TPU)["tolerations"]] == ["google.com/tpu"]


def test_gpu_processes_are_told_who_they_are():
    only = container(GPU)
    variables = {entry["name"]: entry for entry in only["env"]}
    # A pod's name in a JobSet: set, job, index of the job, index of the pod.
    replicated, spec = job(GPU)
    first = f"run1-{replicated['name']}-0-0.run1"
    assert variables["JAX_COORDINATOR_ADDRESS"]["value"] == f"{first}:8476"
    assert variables["JAX_NUM_PROCESSES"]["value"] == str(spec["completions"]) == "3"
    field = variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert "batch.kubernetes.io/job-completion-index" in field
    assert only["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert "--distributed" not in only["command"][2]


def test_other_options_find_their_place():
    own = [*GPU, "--queue", "lab", "--service-account", "trainer", "--env", "A=b=c"]
    own += ["--grace-seconds", "15", "--volume-claim", "disk:/data"]
    command = ["train", "--workdir", "/data/run1"]
    found = manifest(own, command)
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "lab"}
    spec = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert spec["serviceAccountName"] == "trainer"
    assert spec["terminationGracePeriodSeconds"] == 15
    (only,) = spec["containers"]
    assert {"name": "A", "value": "b=c"} in only["env"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounted = {mount["mountPath"]: mount["name"] for mount in only["volumeMounts"]}
    claim = volumes[mounted["/data"]]["persistentVolumeClaim"]
    assert claim == {"claimName": "disk"}
    assert volumes[mounted["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}


@pytest.mark.parametrize("claim", [[], ["--volume-claim", "disk:/data"]])
def test_a_workdir_that_pods_do_not_share_is_refused(claim):
    own = [*GPU, *claim, "--dry-run", "--", "train", "--workdir", "/runs/one"]
    result = launch("launch_gke.py", own)
    assert result.returncode == 1
    assert "--workdir /runs/one" in result.stderr


def test_the_manifest_that_is_written_is_the_one_that_is_applied(tmp_path, tools):
    file = tmp_path / "run1.json"
    result = launch("launch_gke.py", [*TPU, "--write", file, "--", *COMMAND])
    assert result.returncode == 0
    assert str(file) in result.stdout
    assert json.loads(file.read_text()) == manifest(TPU)
    tools("kubectl", f'#!/bin/sh\necho "$@" > {tmp_path}/said; cat > {tmp_path}/got\n')
    path = f"{tmp_path}/tools:/usr/bin:/bin"
    assert launch("launch_gke.py", [*TPU, "--", *COMMAND], path=path).returncode == 0
    assert (tmp_path / "said").read_text() == "apply --filename -\n"
    assert json.loads((tmp_path / "got").read_text()) == manifest(TPU)
    tools("kubectl", "#!/bin/sh\nexit 1\n")
    result = launch("launch_gke.py", [*TPU, "--", *COMMAND], path=path)
    assert result.returncode == 1
    assert "kubectl apply" in result.stderr


@pytest.mark.parametrize("own", [TPU, GPU])
def test_the_container_runs_the_command_whole(own, tmp_path, tools):
    said = tmp_path / "said"
    tool = tools(
        "resnet-jax", f"#!/bin/sh\nfor a; do printf '%s\\n' \"$a\" >> {said}; done\n"
    )
    command = container(own)["command"]
    subprocess.run(command, env={"PATH": f"{tool}:/usr/bin:/bin"}, check=True)
    flags = ["--distributed"] if own is TPU else []
    assert said.read_text().splitlines() == [*COMMAND, *flags]


def test_kubernetes_puts_no_variable_into_the_command():
    command = [*COMMAND, "--config.data.name=$(HOME)"]
    found = manifest(GPU, command)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (only,) = found["template"]["spec"]["containers"]
    assert "=$$(HOME)" in only["command"][2]


def xpk_flags(*own):
    words = dry_run([*XPK, *own])
    assert words[:3] == ["xpk", "workload", "create"]
    return dict(word.partition("=")[::2] for word in words[3:])


def test_xpk_is_told_all():
    found = xpk_flags(
        *shlex.split("--slices 2 --restarts 9 --spot --project lab --zone us-east5-a"),
        *shlex.split("--env A=b=c --grace-seconds 60"),
    )
    command = found.pop("--command")
    assert "resnet-jax train" in command
    assert found == {
        "--cluster": "pods",
        "--workload": "run1",
        "--tpu-type": "v5litepod-16",
        "--num-slices": "2",
        "--docker-image": "i",
        "--max-restarts": "9",
        "--restart-on-exit-codes": "1",
        "--termination-grace-period-seconds": "60",
        "--env": "A=b=c",
        "--project": "lab",
        "--zone": "us-east5-a",
        "--spot": "",
    }


def test_what_xpk_runs_in_a_subshell_gets_its_signal(tools):
    tool = tools(
        "resnet-jax",
        "#!/bin/sh\ntrap 'echo saved; exit 0' TERM\necho ready\n"
        "while :; do sleep 0.1; done\n",
    )
    # As xpk has it: the process that it signals is the one of the parentheses.
    script = f"({xpk_flags()['--command']}) & echo $!; wait $!; echo code $?"
    with subprocess.Popen(
        ["bash", "-c", script],
        env={"PATH": f"{tool}:/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        first = {process.stdout.readline().strip() for _ in range(2)}
        (pid,) = first - {"ready"}
        os.kill(int(pid), signal.SIGTERM)
        assert process.stdout.read().splitlines() == ["saved", "code 143"]
