r"""Runs resnet-jax on Google Kubernetes Engine, or another Kubernetes with JobSet.

  python scripts/launch_gke.py xpk --name run1 --cluster pods --tpu-type v5litepod-16 \
      --image REGION-docker.pkg.dev/PROJECT/REPOSITORY/resnet-jax:tpu --dry-run -- \
      train --config configs/imagenet.py:resnet50 --workdir gs://bucket/run1

  python scripts/launch_gke.py jobset --name run1 --tpu tpu-v5-lite-podslice \
      --topology 4x4 --image IMAGE --write run1.json -- train ...

  python scripts/launch_gke.py jobset --name run1 --hosts 2 --gpus-per-host 8 \
      --image IMAGE --volume-claim data:/data -- train ... --workdir /data/run1

`xpk` submits to a cluster that xpk made. `jobset` submits a JobSet with kubectl, in the
namespace and cluster of its current context; --write keeps the manifest in place of
submitting it. It is JSON, which is YAML too.

Exit status: 0 when the work is submitted or written, 1 for a fault, told in one
sentence.
"""

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch_common import (
    Commands,
    LaunchError,
    add_common,
    at_least,
    check_bucket,
    check_command,
    check_shared,
    main,
    name_of,
    saving_script,
)

_COORDINATOR_PORT = 8476
_WORKERS = "workers"


def launch(own: list[str], command: list[str]) -> int:
    """Submits a command of ``resnet-jax``; returns the exit status."""
    options = _parse(own)
    check_command(command)
    if getattr(options, "volume_claim", None) is None:
        check_bucket(command, "the disk of a container goes with it")
    else:
        check_shared(command, mount=options.volume_claim[1])
    commands = Commands(options.dry_run)
    options.submit(options, command, commands)
    return 0


def jobset(options: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """The manifest of a JobSet: on TPUs a Job a slice, on GPUs one Job in all."""
    on_tpu = options.tpu is not None
    hosts = _hosts_of_slice(options) if on_tpu else options.hosts
    job = {
        "parallelism": hosts,
        "completions": hosts,
        # A run cannot go on without one of its hosts: the whole is started again.
        "backoffLimit": 0,
        "template": {"spec": _pod(options, command, hosts)},
    }
    metadata: dict[str, Any] = {"name": options.name}
    if options.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
    if on_tpu:
        # A Job to a node pool, which is a slice.
        exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {exclusive: "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": options.restarts},
            "replicatedJobs": [
                {
                    "name": _WORKERS,
                    "replicas": options.slices if on_tpu else 1,
                    "template": {"spec": job},
                }
            ],
        },
    }


def _pod(
    options: argparse.Namespace, command: Sequence[str], hosts: int
) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_seconds,
        "containers": [_container(options, command, hosts)],
        # Processes that read data hand it over in shared memory.
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    selector = {}
    # Nodes with accelerators and of spot VMs keep other pods away by taints.
    tolerated = ["nvidia.com/gpu" if options.tpu is None else "google.com/tpu"]
    if options.tpu is not None:
        selector["cloud.google.com/gke-tpu-accelerator"] = options.tpu
        selector["cloud.google.com/gke-tpu-topology"] = options.topology
        # Slices talk over the hosts' own network, without an overlay.
        pod["hostNetwork"] = True
        pod["dnsPolicy"] = "ClusterFirstWithHostNet"
    if options.gpu_label is not None:
        selector["cloud.google.com/gke-accelerator"] = options.gpu_label
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerated.append("cloud.google.com/gke-spot")
    if selector:
        pod["nodeSelector"] = selector
    pod["tolerations"] = [{"key": key, "operator": "Exists"} for key in tolerated]
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if options.volume_claim is not None:
        claim = {"claimName": options.volume_claim[0]}
        pod["volumes"].append({"name": "data", "persistentVolumeClaim": claim})
    return pod


def _container(
    options: argparse.Namespace, command: Sequence[str], hosts: int
) -> dict[str, Any]:
    on_tpu = options.tpu is not None
    variables = [{"name": name, "value": value} for name, value in options.env]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if options.volume_claim is not None:
        mounts.append({"name": "data", "mountPath": options.volume_claim[1]})
    chips = (
        {"google.com/tpu": options.chips_per_host}
        if on_tpu
        else {"nvidia.com/gpu": options.gpus_per_host}
    )
    container: dict[str, Any] = {
        "name": "resnet-jax",
        "image": options.image,
        "command": ["sh", "-c", _script(command, distributed=on_tpu)],
        "env": variables if on_tpu else variables + _processes(options.name, hosts),
        "resources": {"limits": chips},
        "volumeMounts": mounts,
    }
    if on_tpu:
        container["securityContext"] = {"privileged": True}
    return container


def _processes(name: str, hosts: int) -> list[dict[str, Any]]:
    """Where process 0 listens, how many there are, and which one this is.

    jax would find these out by itself from a service account that may read pods and
    jobs; a JobSet's names are known beforehand, and no rights are needed.
    """
    first = f"{name}-{_WORKERS}-0-0.{name}"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{first}:{_COORDINATOR_PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(hosts)},
        {
            "name": "JAX_PROCESS_ID",
            "valueFrom": {"fieldRef": {"fieldPath": index}},
        },
    ]


def _script(command: Sequence[str], *, distributed: bool) -> str:
    flags = ["--distributed"] if distributed else []
    # Kubernetes puts a variable in the place of $(NAME), unless the $ is doubled.
    script = saving_script(shlex.join(["resnet-jax", *command, *flags]))
    return script.replace("$(", "$$(")


def _submit_jobset(
    options: argparse.Namespace, command: Sequence[str], commands: Commands
) -> None:
    manifest = jobset(options, command)
    if options.write is not None and not commands.dry_run:
        try:
            options.write.write_text(json.dumps(manifest, indent=2) + "\n")
        except OSError as error:
            raise LaunchError(
                f"{options.write} cannot be written: {error.strerror}"
            ) from error
        print(f"wrote {options.write}: kubectl apply --filename {options.write}")
        return
    commands.require("kubectl")
    commands.must(["kubectl", "apply", "--filename", "-"], stdin=json.dumps(manifest))


def _submit_xpk(
    options: argparse.Namespace, command: Sequence[str], commands: Commands
) -> None:
    program = shlex.join(["resnet-jax", *command, "--distributed"])
    arguments = [
        "xpk",
        "workload",
        "create",
        f"--cluster={options.cluster}",
        f"--workload={options.name}",
        f"--tpu-type={options.tpu_type}",
        f"--num-slices={options.slices}",
        f"--docker-image={options.image}",
        f"--max-restarts={options.restarts}",
        # xpk starts again after the codes of signals; 1 is also that of a lost peer.
        "--restart-on-exit-codes=1",
        f"--termination-grace-period-seconds={options.grace_seconds}",
        # xpk sends SIGTERM to the process that it started, which is to be this shell.
        f"--command=exec {shlex.join(['sh', '-c', saving_script(program)])}",
    ]
    arguments += [f"--env={name}={value}" for name, value in options.env]
    arguments += [f"--project={options.project}"] if options.project else []
    arguments += [f"--zone={options.zone}"] if options.zone else []
    arguments += ["--spot"] if options.spot else []
    commands.require("xpk")
    commands.must(arguments)


def _hosts_of_slice(options: argparse.Namespace) -> int:
    chips = math.prod(int(side) for side in options.topology.split("x"))
    if chips % options.chips_per_host:
        raise LaunchError(
            f"--topology {options.topology} has {chips} chips, which hosts of "
            f"--chips-per-host {options.chips_per_host} cannot make up"
        )
    return chips // options.chips_per_host


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_subparsers(metavar="xpk|jobset", required=True)
    _add_xpk(ways.add_parser("xpk", help="a workload of a cluster that xpk made"))
    _add_jobset(ways.add_parser("jobset", help="a JobSet, by kubectl"))
    options = parser.parse_args(arguments)
    if options.submit is _submit_jobset:
        _check_jobset(parser, options)
    return options


def _add_xpk(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--tpu-type", required=True, help="such as v5litepod-16")
    parser.add_argument("--project", help="default: that of gcloud's configuration")
    parser.add_argument("--zone", help="default: that of gcloud's configuration")
    parser.set_defaults(submit=_submit_xpk)


def _add_jobset(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--tpu", metavar="LABEL", help="gke-tpu-accelerator, as tpu-v5-lite-podslice"
    )
    parser.add_argument(
        "--topology", metavar="AxB[xC]", help="gke-tpu-topology of a slice, as 4x4"
    )
    parser.add_argument("--chips-per-host", type=at_least(1), default=4)
    parser.add_argument("--hosts", type=at_least(1), help="of GPUs")
    parser.add_argument("--gpus-per-host", type=at_least(1))
    parser.add_argument(
        "--gpu-label", metavar="LABEL", help="gke-accelerator, as nvidia-h100-80gb"
    )
    parser.add_argument("--queue", help="Kueue's LocalQueue")
    parser.add_argument("--service-account", help="of Kubernetes, for the bucket")
    parser.add_argument(
        "--volume-claim",
        metavar="CLAIM:FOLDER",
        type=_claim,
        help="shared file system that all pods mount",
    )
    parser.add_argument(
        "--write", metavar="FILE", type=Path, help="write the manifest; submit nothing"
    )
    parser.set_defaults(submit=_submit_jobset)


def _add_run(parser: argparse.ArgumentParser) -> None:
    # xpk takes 40 characters, and pods get longer names made from it.
    parser.add_argument("--name", type=name_of(40), required=True)
    parser.add_argument(
        "--image", required=True, help="built from docker/tpu.Dockerfile or gpu's"
    )
    parser.add_argument("--slices", type=at_least(1), default=1, help="of TPUs")
    parser.add_argument("--spot", action="store_true", help="on nodes of spot VMs")
    parser.add_argument(
        "--restarts",
        type=at_least(0),
        default=0,
        help="how often the whole is started again after a failure or preemption",
    )
    parser.add_argument(
        "--grace-seconds",
        type=at_least(1),
        default=120,
        help="between SIGTERM and SIGKILL; nodes of spot VMs give less",
    )
    add_common(parser)


def _check_jobset(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    gpu = options.hosts is not None and options.gpus_per_host is not None
    tpu = options.tpu is not None and options.topology is not None
    any_gpu = options.hosts is not None or options.gpus_per_host is not None
    any_tpu = options.tpu is not None or options.topology is not None
    if gpu == tpu or (any_gpu and any_tpu):
        parser.error(
            "give --tpu and --topology for TPUs, or --hosts and --gpus-per-host "
            "for GPUs"
        )
    if tpu and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", options.topology):
        parser.error(f"--topology {options.topology} is not such as 4x4 or 2x2x4")


def _claim(value: str) -> tuple[str, str]:
    name, colon, folder = value.partition(":")
    if not (name and colon and re.fullmatch(r"(/[^/]+)+", folder)):
        raise argparse.ArgumentTypeError(f"{value!r} is not CLAIM:/FOLDER")
    return name, folder


if __name__ == "__main__":
    sys.exit(main(launch))
