import shlex
import signal
import subprocess
import sys

import pytest
import yaml

from tests.launch.conftest import launch

COMMAND = shlex.split(
    "train --config configs/imagenet.py:resnet50 --workdir gs://bucket/run1 "
    "'--config.data.train_split=train[:9 %]'"
)
TPU = shlex.split("--name run1 --image i --tpu tpu-v5-lite-podslice")
TPU += ["--topology", "4x8"]
GPU = shlex.split("--name run1 --image i --hosts 3 --gpus-per-host 8")


def manifest(own, command=COMMAND):
    result = launch("gke", [*own, "--dry-run", "--", *command])
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


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


def test_chips_that_hosts_cannot_make_up_are_refused():
    own = [*TPU, "--topology", "2x3", "--dry-run", "--", *COMMAND]
    result = launch("gke", own)
    assert result.returncode == 1
    assert "has 6 chips" in result.stderr


def test_pods_go_to_nodes_of_their_kind():
    assert pod(TPU)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert pod(GPU)["nodeSelector"] == {}
    assert pod(GPU)["hostNetwork"] is False
    assert pod(TPU)["hostNetwork"] is True
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
    assert "--distributed" not in only["args"]


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
    result = launch("gke", own)
    assert result.returncode == 1
    assert "--workdir /runs/one" in result.stderr


def test_kubectl_gets_the_manifest_and_its_failure_is_reported(tmp_path, tools):
    tools("kubectl", f'#!/bin/sh\necho "$@" > {tmp_path}/said; cat > {tmp_path}/got\n')
    path = f"{tmp_path}/tools:/usr/bin:/bin"
    assert launch("gke", [*TPU, "--", *COMMAND], path=path).returncode == 0
    assert (tmp_path / "said").read_text() == "apply --filename -\n"
    assert yaml.safe_load((tmp_path / "got").read_text()) == manifest(TPU)
    tools("kubectl", "#!/bin/sh\nexit 1\n")
    result = launch("gke", [*TPU, "--", *COMMAND], path=path)
    assert result.returncode == 1
    assert "kubectl apply" in result.stderr


@pytest.mark.parametrize("own", [TPU, GPU])
def test_the_container_runs_the_command_whole(own, tmp_path, tools):
    said = tmp_path / "said"
    tool = tools(
        "resnet-jax", f"#!/bin/sh\nfor a; do printf '%s\\n' \"$a\" >> {said}; done\n"
    )
    only = container(own)
    subprocess.run(
        [*only["command"], *only["args"]],
        env={"PATH": f"{tool}:/usr/bin:/bin"},
        check=True,
    )
    flags = ["--distributed"] if own is TPU else []
    assert said.read_text().splitlines() == [*COMMAND, *flags]


def test_kubernetes_puts_no_variable_into_the_command():
    command = [*COMMAND, "--config.data.name=$(HOME)"]
    found = manifest(GPU, command)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (only,) = found["template"]["spec"]["containers"]
    assert only["args"][-1] == "--config.data.name=$$(HOME)"
    # Nor into the script around it.
    assert "$(" not in only["command"][2]


# A run that saves for half a second when it gets SIGTERM, and ends with a code.
RUN = """
import os, signal, sys, time
def stop(*_):
    time.sleep(0.5)
    os.write(1, b"saved\\n")
    sys.exit({code})
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep({seconds})
sys.exit({code})
"""


@pytest.fixture(scope="module")
def in_container():
    """The command of a container, before the run's own."""
    only = container(GPU)
    return [*only["command"], "sh", sys.executable, "-c"]


@pytest.mark.parametrize("code", [0, 3])
def test_a_run_that_ends_keeps_its_exit_status(in_container, code):
    command = [*in_container, RUN.format(code=code, seconds=0)]
    assert subprocess.run(command, timeout=30).returncode == code


@pytest.mark.parametrize(("code", "status"), [(0, 143), (3, 3)])
def test_a_run_that_gets_sigterm_saves_and_is_not_finished(in_container, code, status):
    command = [*in_container, RUN.format(code=code, seconds=60)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "saved\n"
        assert process.wait(timeout=20) == status
