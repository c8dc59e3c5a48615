r"""Runs one resnet-jax command as several processes: here, or on many hosts.

  python launch/launch.py local --processes 2 -- \
      train --config digits --workdir runs/two
  python launch/launch.py tpu --name run1 --zone us-east5-a \
      --accelerator v5litepod-16 --spot --restarts 20 -- \
      train --config imagenet:resnet50 --workdir gs://bucket/run1
  python launch/launch.py gke --name run1 --tpu tpu-v5-lite-podslice --topology 4x4 \
      --image IMAGE --restarts 20 -- train ...
  python launch/launch.py gke --name run1 --hosts 4 --gpus-per-host 8 --image IMAGE \
      --volume-claim shared:/data -- train ... --workdir /data/run1
  python launch/launch.py slurm --name run1 --nodes 4 --gpus-per-node 8 \
      --time 24:00:00 --restarts 20 -- train ... --workdir /shared/run1

tpu, gke and slurm fill in the template beside this file and pass it to bash, kubectl or
sbatch. --dry-run prints the filled template and runs nothing. docs/launch.md says more.
Needs the standard library alone.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

FOLDER = Path(__file__).resolve().parent
EXAMPLE = "-- train --config imagenet --workdir gs://bucket/run"
# docs.cloud.google.com/tpu/docs/runtimes, the images to install JAX on.
RUNTIME_VERSIONS = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
COORDINATOR_PORT = 8476


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = parse(arguments[:at]), arguments[at + 1 :]
    if not command:
        fail(f"the resnet-jax command is missing: put it after --, as in {EXAMPLE}")
    return options.launch(options, command)


def local(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Runs processes on this machine; returns the status of the first that fails."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = options.port or server.getsockname()[1]
    processes = []
    for index in range(options.processes):
        devices = str(options.devices)
        variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices}
        if options.gpu:
            variables = {"CUDA_VISIBLE_DEVICES": str(index)}
        flags = [f"--coordinator=127.0.0.1:{port}", f"--processes={options.processes}"]
        program = [sys.executable, "-m", "resnet_jax", *command, *flags]
        program.append(f"--process-id={index}")
        processes.append(subprocess.Popen(program, env=os.environ | variables))

    def stop(*_: Any) -> None:
        for process in processes:
            process.terminate()

    # A terminal sends Ctrl-C to the processes itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    failed = 0
    while True:
        codes = [process.poll() for process in processes]
        failed = failed or next(filter(None, codes), 0)
        if None not in codes:
            return failed if failed >= 0 else 128 - failed
        time.sleep(0.1)


def tpu(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Creates a Cloud TPU slice, runs the command on it and deletes it."""
    check(command, is_gcs, "must be gs://BUCKET/FOLDER: a slice has no disk")
    config = (option(command, "--config") or "imagenet").split(":")[0]
    files = [FOLDER.parent / config, FOLDER.parent / "configs" / f"{config}.py"]
    if os.path.isabs(config) or not any(file.is_file() for file in files):
        fail(f"--config {config} is not a file of this repository, as hosts need it")
    kind = options.accelerator.partition("-")[0]
    image = options.runtime_version or RUNTIME_VERSIONS.get(kind)
    if image is None:
        known = ", ".join(RUNTIME_VERSIONS)
        fail(f"no image is known for {kind}, only for {known}: give --runtime-version")
    where = [f"--zone={options.zone}", flag("project", options.project)]
    request = [
        f"--accelerator-type={options.accelerator}",
        f"--runtime-version={image}",
        "--spot" * options.spot,
        "--reserved" * options.reserved,
        "--internal-ips" * options.internal_ip,
        flag("service-account", options.service_account),
    ]
    variables = [f"{name}={value}" for name, value in options.env]
    program = ["env", *variables, ".venv/bin/resnet-jax", *command, "--distributed"]
    result = f"{option(command, '--workdir')}/result.json"
    script = fill(
        "tpu.sh",
        options,
        where=shlex.join(filter(None, where)),
        request=shlex.join(filter(None, request)),
        connection="--internal-ip" * options.internal_ip,
        # A preemption may show a minute late.
        looks=math.ceil(60 / options.poll_seconds) if options.spot else 0,
        keep="1" * options.keep,
        program=shlex.quote(shlex.join(program)),
        repository=shlex.quote(str(FOLDER.parent)),
        result=shlex.quote(result if command[0] == "train" else ""),
    )
    if options.dry_run:
        return submit(script, [], dry_run=True)
    require("gcloud")
    require("git")
    # The script replaces this process, so it gets the signals.
    return os.execvp("bash", ["bash", "-c", script])


def gke(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Creates a JobSet on Kubernetes, in the namespace of kubectl's context."""
    on_tpu = bool(options.tpu and options.topology)
    on_gpu = bool(options.hosts and options.gpus_per_host)
    if on_tpu == on_gpu or (on_gpu and (options.tpu or options.topology)):
        fail("give --tpu and --topology, or --hosts and --gpus-per-host")
    # Worker processes pass images in shared memory.
    volumes: list[Any] = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "memory", "mountPath": "/dev/shm"}]
    if options.volume_claim is None:
        check(command, is_gcs, "must be gs://BUCKET/FOLDER: pods have no disk")
    else:
        claim, mount = options.volume_claim
        check(
            command,
            lambda path: is_gcs(path) or is_inside(path, mount),
            f"must be gs://BUCKET/FOLDER, or in the shared folder {mount}",
        )
        volumes += [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]
        mounts += [{"name": "data", "mountPath": mount}]
    variables: list[Any] = [{"name": key, "value": text} for key, text in options.env]
    annotations = {}
    if on_tpu:
        hosts, chips = hosts_of_slice(options), options.chips_per_host
        command = [*command, "--distributed"]
        # One Job per node pool, which is a slice.
        exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        annotations[exclusive] = "cloud.google.com/gke-nodepool"
    else:
        hosts, chips = options.hosts, options.gpus_per_host
        variables += process_variables(options.name, hosts)
    resource = "google.com/tpu" if on_tpu else "nvidia.com/gpu"
    labels = {
        "tpu-accelerator": options.tpu,
        "tpu-topology": options.topology,
        "accelerator": options.gpu_label,
        "spot": "true" if options.spot else None,
    }
    selector = {f"cloud.google.com/gke-{k}": v for k, v in labels.items() if v}
    tolerated = [resource, *["cloud.google.com/gke-spot"] * options.spot]
    manifest = fill(
        "gke.yaml",
        options,
        labels={"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {},
        annotations=annotations,
        slices=options.slices if on_tpu else 1,
        hosts=hosts,
        service_account=json.dumps(options.service_account or "default"),
        node_selector=selector,
        tolerations=[{"key": key, "operator": "Exists"} for key in tolerated],
        on_tpu=on_tpu,
        dns_policy="ClusterFirstWithHostNet" if on_tpu else "ClusterFirst",
        volumes=volumes,
        mounts=mounts,
        image=json.dumps(options.image),
        env=variables,
        limits={resource: chips},
        # Kubernetes would replace $(NAME) by a variable.
        arguments=json.dumps(["sh", "resnet-jax", *command]).replace("$(", "$$("),
    )
    return submit(manifest, ["kubectl", "apply", "--filename", "-"], options.dry_run)


def slurm(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Submits a batch job to Slurm, with one process per GPU."""
    check(command, is_shared, "must be gs://BUCKET/FOLDER or a folder that hosts share")
    words = ("cpus-per-task", "partition", "account", "qos", "constraint")
    flags = [flag(word, getattr(options, word.replace("-", "_"))) for word in words]
    setup = [options.setup] if options.setup else []
    setup += [f"export {name}={shlex.quote(value)}" for name, value in options.env]
    script = fill(
        "slurm.sbatch",
        options,
        requeue="requeue" if options.restarts else "no-requeue",
        directives="\n".join(f"#SBATCH {text}" for text in flags if text),
        setup="\n".join(setup),
        srun=flag("cpus-per-task", options.cpus_per_task),
        command=shlex.join(command),
    )
    return submit(script, ["sbatch", "--parsable"], options.dry_run)


def check(command: Sequence[str], accepted: Callable[[str], Any], rule: str) -> None:
    """Refuses a command, workdir or data that cannot be used on several hosts."""
    many = (["train"], ["evaluate"], ["benchmark", "input"])
    if list(command[: 1 + (command[0] == "benchmark")]) not in many:
        fail(f"resnet-jax {command[0]} does not run on several hosts")
    for word in ("--distributed", "--coordinator", "--processes", "--process-id"):
        if any(argument.split("=")[0] == word for argument in command):
            fail(f"leave {word} out: the launcher passes it to every process")
    if command[0] != "benchmark" and option(command, "--workdir") is None:
        fail(f"resnet-jax {command[0]} needs --workdir DIR")
    for name in ("--workdir", "--config.data.path", "--config.data.data_dir"):
        path = option(command, name)
        if path is not None and not accepted(path):
            fail(f"{name} {path} {rule}")


def option(command: Sequence[str], name: str) -> str | None:
    """The last value of ``--name VALUE`` or ``--name=VALUE``."""
    value = None
    for argument, following in zip(command, [*command[1:], None], strict=True):
        if argument == name and following is not None:
            value = following
        elif argument.startswith(f"{name}="):
            value = argument.removeprefix(f"{name}=")
    return value


def is_gcs(path: str) -> bool:
    """Whether a path is inside a bucket."""
    return re.fullmatch(r"gs://[^/]+/.+", path) is not None


def is_shared(path: str) -> bool:
    """Whether several hosts may share a path."""
    local = ("/tmp", "/var/tmp", "/dev/shm", "/run")
    on_disk = path.startswith("/") and not any(is_inside(path, here) for here in local)
    return on_disk or is_gcs(path)


def is_inside(path: str, folder: str) -> bool:
    """Whether an absolute path is a folder or below it."""
    return f"{os.path.normpath(path)}/".startswith(f"{folder}/")


def hosts_of_slice(options: argparse.Namespace) -> int:
    """The number of hosts of a TPU slice."""
    per_host = options.chips_per_host
    chips = math.prod(map(int, options.topology.split("x")))
    if chips % per_host:
        fail(f"--topology has {chips} chips, which --chips-per-host does not divide")
    return chips // per_host


def process_variables(name: str, hosts: int) -> list[dict[str, Any]]:
    """The variables that connect the pods of a JobSet, by their known host names.

    jax could ask Kubernetes, but needs an extra and the right to read pods and jobs.
    """
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    address = f"{name}-workers-0-0.{name}:{COORDINATOR_PORT}"
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": address},
        {"name": "JAX_NUM_PROCESSES", "value": str(hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def fill(template: str, options: argparse.Namespace, **values: Any) -> str:
    """A template with each ``@WORD@`` replaced by a value, or the option of that name.

    Values that are not text are written as JSON.
    """
    known = vars(options) | values

    def word(found: re.Match[str]) -> str:
        value = known[found[1].lower()]
        return value if isinstance(value, str) else json.dumps(value)

    return re.sub("@([A-Z_]+)@", word, (FOLDER / template).read_text())


def submit(text: str, program: Sequence[str], dry_run: bool) -> int:
    """Passes a text to another program; a dry run prints it instead."""
    if dry_run:
        print(text, end="")
        return 0
    require(program[0])
    status = subprocess.run(program, input=text, text=True, check=False).returncode
    if status:
        fail(f"{shlex.join(program)} failed with exit status {status}")
    return 0


def require(tool: str) -> None:
    """Fails if a tool is missing."""
    if shutil.which(tool) is None:
        fail(f"{tool} is not installed or not on PATH; --dry-run does not need it")


def fail(sentence: str) -> NoReturn:
    """Exits with status 1 and a sentence."""
    sys.exit(f"launch.py: error: {sentence}")


def flag(name: str, value: object) -> str:
    """``--name=value``; empty if there is no value."""
    return f"--{name}={value}" if value else ""


def matching(pattern: str, what: str, kind: Callable[[str], Any] = str) -> Any:
    """An argparse type: text that matches a pattern."""

    def check(value: str) -> Any:
        if not re.fullmatch(pattern, value):
            raise argparse.ArgumentTypeError(f"{value!r} is not {what}")
        return kind(value)

    return check


NAME = matching(
    r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?",
    "a name of at most 40 lower-case letters, digits and hyphens, from a letter on",
)
COUNT = matching(r"[1-9]\d*", "a whole number of at least 1", int)
WORD = matching(r"[A-Za-z0-9_.,&|-]+", "a word without spaces and quotes")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The launcher's own options, with ``launch``, the function of the subcommand."""
    number = matching(r"\d+", "a whole number of at least 0", int)
    pair = matching(
        r"(?s)[A-Za-z_]\w*=.*", "NAME=VALUE", lambda text: text.split("=", 1)
    )
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--restarts", type=number, default=0, help="after preemptions (default: 0)")
    add("--env", metavar="NAME=VALUE", action="append", default=[], type=pair,
        help="a variable for every process; may be repeated")  # fmt: skip
    add("--dry-run", action="store_true", help="print what would run, and run nothing")

    parser = argparse.ArgumentParser(
        prog="launch.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(metavar="local|tpu|gke|slurm", required=True)
    add = kinds.add_parser("local", help="processes on this machine").add_argument
    add("--processes", type=COUNT, default=2, metavar="N")
    add("--devices", type=COUNT, default=1, help="simulated CPU devices per process")
    add("--port", type=COUNT, help="port of process 0 (default: a free one)")
    add("--gpu", action="store_true", help="give GPU number I to process I")

    kind = kinds.add_parser("tpu", help="a Cloud TPU slice", parents=[common])
    add = kind.add_argument
    add("--name", type=NAME, required=True, help="name of the slice")
    add("--zone", type=WORD, required=True, help="zone, such as us-east5-a")
    add("--accelerator", type=matching(r"v\d+[a-z]*-\d+", "such as v5litepod-16"),
        required=True, help="v5litepod-16, v6e-64, v5p-32, ...")  # fmt: skip
    add("--runtime-version", help="image of the hosts (default: by the accelerator)")
    add("--project", help="(default: the project of gcloud's configuration)")
    add("--spot", action="store_true", help="cheaper, but may be preempted at any time")
    add("--reserved", action="store_true", help="use a reservation")
    add("--service-account", help="account that reads and writes the bucket")
    add("--internal-ip", action="store_true", help="no external addresses")
    add("--keep", action="store_true", help="do not delete the slice at the end")
    add("--poll-seconds", type=matching(r"(\d+\.)?\d*[1-9]\d*", "above 0", float),
        default=30.0, help="seconds between checks (default: 30)")  # fmt: skip

    kind = kinds.add_parser("gke", help="Kubernetes with JobSet", parents=[common])
    add = kind.add_argument
    add("--name", type=NAME, required=True, help="name of the JobSet")
    add(
        "--image",
        required=True,
        help="built from docker/tpu.Dockerfile or gpu.Dockerfile",
    )
    add("--tpu", metavar="LABEL", help="gke-tpu-accelerator: tpu-v5-lite-podslice, ...")
    add("--topology", metavar="AxB[xC]", help="gke-tpu-topology of a slice",
        type=matching(r"[1-9]\d*(x[1-9]\d*){1,2}", "such as 4x4 or 2x2x4"))  # fmt: skip
    add("--slices", type=COUNT, default=1, help="TPU slices (default: 1)")
    add("--chips-per-host", type=COUNT, default=4, help="of a slice (default: 4)")
    add("--hosts", type=COUNT, help="hosts with GPUs")
    add("--gpus-per-host", type=COUNT)
    add("--gpu-label", metavar="LABEL", help="gke-accelerator: nvidia-h100-80gb, ...")
    add("--spot", action="store_true", help="on spot VMs")
    add("--queue", help="LocalQueue of Kueue; xpk's clusters have multislice-queue")
    add("--service-account", help="Kubernetes account that reaches the bucket")
    add("--volume-claim", metavar="CLAIM:/FOLDER", help="a shared file system",
        type=matching(r"[^:]+:(/[^/]+)+", "CLAIM:/FOLDER",
                      lambda value: tuple(value.split(":"))))  # fmt: skip
    add("--grace-seconds", type=COUNT, default=120, help="from SIGTERM to SIGKILL")

    kind = kinds.add_parser("slurm", help="a Slurm cluster with GPUs", parents=[common])
    add = kind.add_argument
    add("--name", type=WORD, required=True, help="name of the job")
    add("--nodes", type=COUNT, required=True)
    add("--gpus-per-node", type=COUNT, required=True)
    add("--time", type=matching(r"\d+|(\d+-)?\d+(:\d\d){0,2}", "such as 24:00:00"),
        required=True, help="limit: 24:00:00, 2-00:00:00, or minutes")  # fmt: skip
    add("--cpus-per-task", type=COUNT, help="cores per GPU")
    for name in ("partition", "account", "qos", "constraint"):
        add(f"--{name}", type=WORD, help="as for sbatch")
    add("--setup", help="shell command before the run, such as module load")
    add("--grace-seconds", type=COUNT, default=120, help="to save before the limit")

    for name, kind in kinds.choices.items():
        kind.set_defaults(launch=globals()[name])
    options = parser.parse_args(arguments)
    if getattr(options, "reserved", False) and options.spot:
        parser.error("--spot and --reserved exclude each other")
    return options


if __name__ == "__main__":
    sys.exit(main())
