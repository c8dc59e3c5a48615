r"""Runs resnet-jax on all hosts of a Cloud TPU slice, from its creation to its end.

  python scripts/launch_tpu.py --name run1 --zone us-east5-a \
      --accelerator v5litepod-16 --spot --restarts 10 --dry-run -- \
      train --config configs/imagenet.py:resnet50 --workdir gs://bucket/run1 \
      --config.data.path=gs://bucket/imagenet

The slice is asked for as a queued resource and waited for; the last commit of this
repository is copied to every host and installed there; the command runs on all of them,
with --distributed; the slice is deleted. A slice that was preempted is asked for again,
up to --restarts times, and the same command goes on from its checkpoint. Interrupted
(Ctrl-C or SIGTERM), the run saves a checkpoint before the slice is deleted. Where this
script itself was killed, the run goes on, and the same command follows it again.

Exit status: 0 when the command is done; its own where it failed; 1 for a fault told in
one sentence; 130 when interrupted.
"""

import argparse
import math
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch_common import (
    REPOSITORY,
    Commands,
    LaunchError,
    add_common,
    at_least,
    check_bucket,
    check_command,
    main,
    name_of,
    option,
    seconds,
)

_ARCHIVE = "resnet_jax.tar.gz"
# docs.cloud.google.com/tpu/docs/runtimes, the images to install JAX on.
_RUNTIME_VERSIONS = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_UNDER_WAY = 'kill -0 "$(cat run.pid)" 2>/dev/null'
_STOP = (
    f'cd resnet_jax; kill -TERM "$(cat run.pid)"; while {_UNDER_WAY}; do sleep 1; done'
)
# The images have Python 3.10, too old for resnet_jax: uv brings one.
_INSTALL = "; ".join(
    (
        "set -e",
        "mkdir -p resnet_jax",
        "cd resnet_jax",
        # Some hosts may still hold on to an earlier run whose peers are gone.
        'if [ -s run.pid ] && kill -TERM "$(cat run.pid)" 2>/dev/null; then '
        f"while {_UNDER_WAY}; do sleep 1; done; fi",
        f"tar -xzf ../{_ARCHIVE}",
        "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv",
        "python3 -m uv venv --quiet --allow-existing --python 3.12 .venv",
        "python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu,gcs]'",
    )
)
# Follows the log to the end of the run and ends with its exit status. The run itself
# hangs on no connection: a dropped one costs only the view of the log.
_FOLLOW = "; ".join(
    (
        "cd resnet_jax",
        "until [ -s run.pid ]; do sleep 1; done",
        'tail -n +1 -f --pid="$(cat run.pid)" run.log',
        "until [ -s exit_code ]; do sleep 1; done",
        'exit "$(cat exit_code)"',
    )
)
_CONNECTION_LOST = 255  # ssh's exit status
_RECONNECTIONS = 10
_LOOKS = 3  # at a state that could not be told


class Slice:
    """A TPU slice of one queued resource, under one name."""

    def __init__(self, options: argparse.Namespace, commands: Commands):
        """Keeps what it is to be; asks for nothing yet."""
        self._options = options
        self._commands = commands
        self._where = [f"--zone={options.zone}"]
        if options.project:
            self._where.append(f"--project={options.project}")
        # Whether there may be something to delete.
        self.exists = False
        self._found = False

    def state(self) -> str:
        """Of the queued resource: ACTIVE, SUSPENDED, FAILED ...; ABSENT without one.

        Raises:
          LaunchError: gcloud could not tell, several times.
        """
        if self._commands.dry_run:
            return "ABSENT"
        for look in range(_LOOKS):
            if look:
                time.sleep(self._options.poll_seconds)
            result = subprocess.run(
                self._describe(), capture_output=True, text=True, check=False
            )
            if result.returncode == 0:
                return result.stdout.strip()
            if "NOT_FOUND" in result.stderr:
                return "ABSENT"
        raise LaunchError(
            f"gcloud cannot tell the state of {self._options.name}: "
            + " ".join(result.stderr.split())
        )

    def acquire(self) -> bool:
        """Asks for the slice and waits for it; returns whether it is there.

        A slice of this name that is there already is taken as it is.

        Raises:
          LaunchError: it was refused, or failed.
        """
        state = self.state()
        self.exists = state != "ABSENT"
        self._found = state == "ACTIVE"
        if state in ("SUSPENDING", "SUSPENDED", "FAILED"):
            self.delete()
            state = "ABSENT"
        if state == "ABSENT":
            self._create()
        return self._wait()

    def copy(self, archive: Path) -> int:
        """Copies a file to the home of every host; returns the exit status."""
        target = f"{self._options.name}:{_ARCHIVE}"
        return self._commands.run(
            [*_tpu_vm("scp"), str(archive), target, *self._on_all_hosts()]
        )

    def ssh(self, script: str) -> int:
        """Runs a script on every host; returns the first exit status that is not 0."""
        return self._commands.run(
            [
                *_tpu_vm("ssh"),
                self._options.name,
                *self._on_all_hosts(),
                f"--command={script}",
            ]
        )

    def is_under_way(self) -> bool:
        """Whether a slice that was there already has a run on every host."""
        return self._found and self.ssh(f"cd resnet_jax && {_UNDER_WAY}") == 0

    def lost(self) -> bool:
        """Whether the slice goes or has gone; a preemption may show after a minute."""
        looks = 1
        if self._options.spot:
            looks += math.ceil(60 / self._options.poll_seconds)
        for look in range(looks):
            if look:
                time.sleep(self._options.poll_seconds)
            if self.state() != "ACTIVE":
                return True
        return False

    def delete(self) -> None:
        """Deletes the slice with its hosts and their disks."""
        command = [*_queued("delete"), self._options.name, *self._where]
        status = self._commands.run([*command, "--force", "--quiet"])
        if status:
            raise LaunchError(
                f"{self._options.name} could not be deleted and may cost money: see "
                f"gcloud compute tpus queued-resources list {shlex.join(self._where)}"
            )
        self.exists = False

    def _describe(self) -> list[str]:
        command = [*_queued("describe"), self._options.name, *self._where]
        return [*command, "--format=value(state.state)"]

    def _create(self) -> None:
        options = self._options
        command = [
            *_queued("create"),
            options.name,
            f"--node-id={options.name}",
            *self._where,
            f"--accelerator-type={options.accelerator}",
            f"--runtime-version={options.runtime_version}",
        ]
        command += ["--spot"] if options.spot else []
        command += ["--reserved"] if options.reserved else []
        command += ["--internal-ips"] if options.internal_ip else []
        if options.service_account:
            command.append(f"--service-account={options.service_account}")
        # A request that failed half-way may have left something.
        self.exists = True
        self._commands.must([*command, "--quiet"])

    def _wait(self) -> bool:
        pause = self._options.poll_seconds
        if self._commands.dry_run:
            describe = shlex.join(self._describe())
            self._commands.show(
                f'until [ "$({describe})" = ACTIVE ]; do sleep {pause:g}; done'
            )
            return True
        said = ""
        while (state := self.state()) != "ACTIVE":
            if state == "FAILED":
                raise LaunchError(
                    f"the request for {self._options.name} failed; its reason: "
                    + shlex.join(self._describe()[:-1])
                )
            if state in ("SUSPENDING", "SUSPENDED", "DELETING", "ABSENT"):
                return False
            if state != said:
                print(f"{self._options.name}: {state}", file=sys.stderr, flush=True)
                said = state
            time.sleep(pause)
        return True

    def _on_all_hosts(self) -> list[str]:
        internal = ["--internal-ip"] if self._options.internal_ip else []
        return ["--worker=all", *self._where, *internal, "--quiet"]


def launch(own: list[str], command: list[str]) -> int:
    """Runs a command of ``resnet-jax`` on a slice; returns the exit status."""
    options = _parse(own)
    check_command(command)
    check_bucket(command, "the disks of a slice are deleted with it")
    _check_config(command)
    commands = Commands(options.dry_run)
    commands.require("gcloud", "git")
    # Ctrl-C and SIGTERM both save, and delete what costs money.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tpu_slice = Slice(options, commands)
    try:
        return _run_to_the_end(options, command, tpu_slice, commands)
    except KeyboardInterrupt:
        print("interrupted: the run saves a checkpoint", file=sys.stderr, flush=True)
        if tpu_slice.state() == "ACTIVE":
            tpu_slice.ssh(_STOP)
        return 130
    finally:
        if tpu_slice.exists and not options.keep:
            tpu_slice.delete()


def _run_to_the_end(
    options: argparse.Namespace,
    command: Sequence[str],
    tpu_slice: Slice,
    commands: Commands,
) -> int:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path("/tmp" if commands.dry_run else folder) / _ARCHIVE
        _pack(archive, commands)
        for attempt in range(options.restarts + 1):
            if attempt:
                print(
                    f"preempted; restart {attempt} of {options.restarts}",
                    file=sys.stderr,
                    flush=True,
                )
            status = _attempt(options, command, tpu_slice, archive)
            if status is not None and _is_done(command, status, commands):
                return 0
            # Exit status 0 without a result: SIGTERM made the run save and stop.
            if status and not tpu_slice.lost():
                return status
    raise LaunchError(
        f"{options.name} was preempted, and --restarts {options.restarts} allows no "
        "further attempt; the same command goes on from the last checkpoint"
    )


def _attempt(
    options: argparse.Namespace,
    command: Sequence[str],
    tpu_slice: Slice,
    archive: Path,
) -> int | None:
    """The exit status of the first step that fails, or 0; None without a slice."""
    if not tpu_slice.acquire():
        return None
    if not tpu_slice.is_under_way():
        status = tpu_slice.copy(archive) or tpu_slice.ssh(_INSTALL)
        status = status or tpu_slice.ssh(_start(options, command))
        if status:
            return status
    for _ in range(_RECONNECTIONS):
        status = tpu_slice.ssh(_FOLLOW)
        if status != _CONNECTION_LOST or tpu_slice.state() != "ACTIVE":
            break
    return status


def _start(options: argparse.Namespace, command: Sequence[str]) -> str:
    """A script that starts the command in the background and returns at once."""
    variables = [f"{name}={value}" for name, value in options.env]
    program = shlex.join(
        ["env", *variables, ".venv/bin/resnet-jax", *command, "--distributed"]
    )
    # `env` is replaced by the program, so that $! is the program's.
    body = f'{program} & echo "$!" > run.pid; wait "$!"; echo "$?" > exit_code'
    return (
        "cd resnet_jax; rm -f run.pid exit_code; "
        f"nohup sh -c {shlex.quote(body)} > run.log 2>&1 < /dev/null &"
    )


def _is_done(command: Sequence[str], status: int, commands: Commands) -> bool:
    """Whether a command that ended so has nothing left to do."""
    if status or command[0] != "train":
        return status == 0
    workdir = option(command, "--workdir") or ""
    return commands.run(["gcloud", "storage", "ls", f"{workdir}/result.json"]) == 0


def _pack(archive: Path, commands: Commands) -> None:
    git = ["git", "-C", str(REPOSITORY)]
    if not commands.dry_run:
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=False
        ).stdout
        if changed:
            print(
                "warning: the last commit is copied; changes since then are not",
                file=sys.stderr,
            )
    commands.must([*git, "archive", "--format=tar.gz", f"--output={archive}", "HEAD"])


def _check_config(command: Sequence[str]) -> None:
    config = option(command, "--config")
    if config is None:
        return
    path = Path(config.split(":")[0])
    if path.is_absolute() or not (REPOSITORY / path).is_file():
        raise LaunchError(
            f"--config {config} is no file of this repository, which every host "
            "gets: give one as configs/imagenet.py"
        )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--name", type=name_of(50), required=True, help="of the slice and its request"
    )
    parser.add_argument("--zone", required=True, help="such as us-east5-a")
    parser.add_argument(
        "--accelerator", required=True, help="such as v5litepod-16, v6e-64, v5p-32"
    )
    parser.add_argument(
        "--runtime-version", help="image of the hosts; default: by the accelerator"
    )
    parser.add_argument("--project", help="default: that of gcloud's configuration")
    price = parser.add_mutually_exclusive_group()
    price.add_argument(
        "--spot", action="store_true", help="cheaper, and taken away at any time"
    )
    price.add_argument("--reserved", action="store_true", help="from a reservation")
    parser.add_argument(
        "--restarts",
        type=at_least(0),
        default=0,
        help="how often a preempted slice is asked for again",
    )
    parser.add_argument("--service-account", help="that reads and writes the bucket")
    parser.add_argument(
        "--internal-ip", action="store_true", help="no external addresses"
    )
    parser.add_argument(
        "--keep", action="store_true", help="do not delete the slice at the end"
    )
    parser.add_argument(
        "--poll-seconds",
        type=seconds,
        default=30.0,
        help="between looks at the state",
    )
    add_common(parser)
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"v\d+[a-z]*-\d+", options.accelerator):
        parser.error(f"--accelerator {options.accelerator} is not such as v5litepod-16")
    if options.runtime_version is None:
        kind = options.accelerator.split("-")[0]
        if kind not in _RUNTIME_VERSIONS:
            parser.error(
                f"no image is known for {kind}: give --runtime-version; "
                f"known are {', '.join(_RUNTIME_VERSIONS)}"
            )
        options.runtime_version = _RUNTIME_VERSIONS[kind]
    return options


def _queued(verb: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb]


def _tpu_vm(verb: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", verb]


if __name__ == "__main__":
    sys.exit(main(launch))
