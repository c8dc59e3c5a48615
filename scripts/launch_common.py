"""What the launch scripts share: checks of a command line, commands run or printed.

The scripts need the standard library alone, so that they also run on a laptop that has
neither jax nor resnet_jax.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

# What tells processes of each other is added by the launcher, never by its user.
_PROCESS_FLAGS = ("--distributed", "--coordinator", "--processes", "--process-id")
_LOCAL_TO_A_HOST = ("/tmp", "/var/tmp", "/dev/shm", "/run")


class LaunchError(Exception):
    """A fault that its user can mend, told in one sentence."""


class Commands:
    """Runs commands of other tools, or with ``dry_run`` only prints them.

    A printed command is one line, quoted so that a shell reads it as it would be run.
    """

    def __init__(self, dry_run: bool):
        """Keeps the choice; runs nothing."""
        self.dry_run = dry_run

    def require(self, *tools: str) -> None:
        """Raises LaunchError for a tool that is not installed; a dry run needs none."""
        for tool in tools:
            if not self.dry_run and shutil.which(tool) is None:
                raise LaunchError(
                    f"{tool} is not installed or not on PATH; install it, or see the "
                    "commands with --dry-run"
                )

    def run(self, command: Sequence[str], stdin: str | None = None) -> int:
        """Runs a command with what it reads; returns its exit status."""
        if self.dry_run:
            self.show(shlex.join(command), stdin)
            return 0
        print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
        return subprocess.run(command, input=stdin, text=True, check=False).returncode

    def must(self, command: Sequence[str], stdin: str | None = None) -> None:
        """Runs a command; raises LaunchError where it fails."""
        status = self.run(command, stdin)
        if status:
            raise LaunchError(
                f"{shlex.join(command[:5])} ... failed with exit status {status}; what "
                "it said stands above"
            )

    def show(self, line: str, stdin: str | None = None) -> None:
        """Prints a shell command on one line, with what it reads before a pipe."""
        if stdin is not None:
            line = f"printf '%s\\n' {shlex.join(stdin.splitlines())} | {line}"
        print(line, flush=True)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A launcher's own arguments and, after ``--``, those of ``resnet-jax``."""
    arguments = list(arguments)
    if "--" not in arguments:
        if {"-h", "--help"}.intersection(arguments):
            return arguments, []
        raise LaunchError(
            "-- is missing: the command of resnet-jax stands after it, as in "
            "-- train --config configs/imagenet.py --workdir gs://bucket/run"
        )
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def option(arguments: Sequence[str], name: str) -> str | None:
    """The last value of ``--name VALUE`` or ``--name=VALUE``; None without one."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == name and following is not None:
            value = following
        elif argument.startswith(f"{name}="):
            value = argument.removeprefix(f"{name}=")
    return value


def check_command(command: Sequence[str]) -> None:
    """Raises LaunchError for a ``resnet-jax`` command that many hosts cannot run."""
    if not command:
        raise LaunchError(
            "nothing stands after --: give the command of resnet-jax, as in "
            "-- train --config configs/imagenet.py --workdir gs://bucket/run"
        )
    if command[0] not in ("train", "evaluate") and command[:2] != [
        "benchmark",
        "input",
    ]:
        raise LaunchError(
            f"resnet-jax {command[0]} does not run on many hosts; train, evaluate and "
            "benchmark input do"
        )
    for argument in command:
        if argument.split("=")[0] in _PROCESS_FLAGS:
            raise LaunchError(
                f"leave {argument.split('=')[0]} out: the launcher says it to every "
                "process"
            )
    if command[0] != "benchmark" and option(command, "--workdir") is None:
        raise LaunchError(f"resnet-jax {command[0]} needs --workdir DIR")


def check_shared(command: Sequence[str], mount: str | None = None) -> None:
    """Raises LaunchError for a workdir or data that not every host can reach.

    Args:
      command: of ``resnet-jax``.
      mount: a folder that all hosts share; None: any absolute folder may be one.
    """
    for name in ("--workdir", "--config.data.path", "--config.data.data_dir"):
        path = option(command, name)
        if path is None or path.startswith("gs://"):
            continue
        if not path.startswith("/"):
            raise LaunchError(
                f"{name} {path} is relative: give gs://..., or an absolute folder that "
                "all hosts share"
            )
        if _inside(path, _LOCAL_TO_A_HOST):
            raise LaunchError(
                f"{name} {path} lies on one host alone: give gs://..., or a "
                "folder that all hosts share"
            )
        if mount is not None and not _inside(path, (mount,)):
            raise LaunchError(f"{name} {path} does not lie in the shared {mount}")


def check_bucket(command: Sequence[str], why: str) -> None:
    """Raises LaunchError for a workdir or data outside Cloud Storage."""
    for name in ("--workdir", "--config.data.path", "--config.data.data_dir"):
        path = option(command, name)
        if path is not None and not re.fullmatch(r"gs://[^/]+/.+", path):
            raise LaunchError(f"{name} {path} must be gs://BUCKET/FOLDER: {why}")


def name_of(most: int) -> Callable[[str], str]:
    """A type for argparse: a name of a cloud resource of at most so many characters."""

    def check(value: str) -> str:
        if len(value) > most or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", value):
            raise argparse.ArgumentTypeError(
                f"{value!r} is not a name: at most {most} lower-case letters, digits "
                "and hyphens, the first a letter, the last not a hyphen"
            )
        return value

    return check


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: a whole number, not below one."""

    def check(value: str) -> int:
        if not re.fullmatch(r"\d+", value) or int(value) < least:
            raise argparse.ArgumentTypeError(
                f"{value!r} is not a whole number of at least {least}"
            )
        return int(value)

    return check


def seconds(value: str) -> float:
    """A type for argparse: a time above zero."""
    if not re.fullmatch(r"\d+(\.\d+)?", value) or float(value) == 0:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number above 0")
    return float(value)


def variable(value: str) -> tuple[str, str]:
    """A type for argparse: NAME=VALUE of an environment."""
    name, equals, content = value.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=VALUE")
    return name, content


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds what every launcher takes."""
    parser.add_argument(
        "--env",
        metavar="NAME=VALUE",
        type=variable,
        action="append",
        default=[],
        help="variable of every process's environment; may be repeated",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print every command as a shell would take it, and run nothing",
    )


def saving_script(program: str) -> str:
    """A POSIX shell command around ``resnet-jax``: stopped by SIGTERM, it exits 143.

    ``resnet-jax`` exits 0 when SIGTERM made it save and stop. Kubernetes takes 0 for a
    run that is done and never starts it again: an interrupted one must not say 0.

    Args:
      program: the command, quoted for a shell.
    """
    return "; ".join(
        (
            "stopped=",
            "trap 'stopped=1; kill -TERM \"$child\" 2>/dev/null' TERM",
            f'{program} & child="$!"',
            # The signal may have come before there was a child to hand it to.
            '[ -z "$stopped" ] || kill -TERM "$child"',
            'wait "$child"',
            'code="$?"',
            # A signal ends `wait` early, and the process goes on until it has saved.
            'while kill -0 "$child" 2>/dev/null; do wait "$child"; code="$?"; done',
            '[ -z "$stopped" ] || [ "$code" -ne 0 ] || code=143',
            'exit "$code"',
        )
    )


def main(launch: Callable[[list[str], list[str]], int]) -> int:
    """Runs a launcher on the command line; returns its exit status.

    Args:
      launch: takes the launcher's own arguments and those of ``resnet-jax``.
    """
    try:
        return launch(*split_arguments(sys.argv[1:]))
    except LaunchError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 1


def _inside(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)
