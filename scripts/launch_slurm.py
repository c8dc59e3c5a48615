r"""Submits resnet-jax to Slurm, a process for every GPU.

  python scripts/launch_slurm.py --name run1 --nodes 4 --gpus-per-node 8 \
      --time 24:00:00 --setup 'source /shared/venv/bin/activate' --restarts 20 -- \
      train --config configs/imagenet.py:resnet50 --workdir /shared/runs/run1 \
      --config.data.path=/shared/imagenet

Two minutes before the time limit, and when Slurm preempts the job, the run saves a
checkpoint; then it is queued again, up to --restarts times, and the same command goes
on. --write keeps the batch script in place of submitting it, --dry-run prints it.

Exit status: 0 when the job is submitted or written, 1 for a fault told in one sentence.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch_common import (
    Commands,
    LaunchError,
    add_common,
    at_least,
    check_command,
    check_shared,
    main,
)


def launch(own: list[str], command: list[str]) -> int:
    """Submits a command of ``resnet-jax``; returns the exit status."""
    options = _parse(own)
    check_command(command)
    check_shared(command)
    script = batch_script(options, command)
    commands = Commands(options.dry_run)
    if options.write is not None and not options.dry_run:
        try:
            options.write.write_text(script)
        except OSError as error:
            raise LaunchError(
                f"{options.write} cannot be written: {error.strerror}"
            ) from error
        print(f"wrote {options.write}: sbatch {options.write}")
        return 0
    commands.require("sbatch")
    commands.must(["sbatch", "--parsable"], stdin=script)
    return 0


def batch_script(options: argparse.Namespace, command: Sequence[str]) -> str:
    """The script for sbatch."""
    lines = ["#!/bin/bash", *(f"#SBATCH {line}" for line in _directives(options)), ""]
    lines += ["set -u", options.setup] if options.setup else ["set -u"]
    lines += [
        f"export {name}={shlex.quote(value)}" for name, value in sorted(options.env)
    ]
    # A task that failed takes the others with it: they could only wait for it.
    srun = ["srun", "--kill-on-bad-exit=1"]
    if options.cpus_per_task is not None:
        # Many releases of Slurm do not hand this on from sbatch to srun.
        srun.append(f"--cpus-per-task={options.cpus_per_task}")
    program = shlex.join([*srun, "resnet-jax", *command, "--distributed"])
    return "\n".join(lines) + _BODY.format(program=program, restarts=options.restarts)


_BODY = """
stopped=
signalled=
# Before the time limit this script alone gets USR1, and scancel reaches the run alone.
trap 'stopped=1; signalled=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
# A preemption tells the run by itself, and a second TERM would end it at once.
trap 'stopped=1; signalled=1' TERM

{program} &
step=$!
# A signal ends wait early, with a status of its own. The run goes on until it has
# saved, and may have ended by the time that the trap has: bash keeps its status.
while
  signalled=
  wait "$step"
  code=$?
  [ -n "$signalled" ]
do
  :
done

if [ -n "$stopped" ] && [ "$code" -eq 0 ]; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
    # Incomplete: not a job that its user cancelled.
    scontrol requeue Incomplete "$SLURM_JOB_ID"
  else
    echo "stopped with a checkpoint; submit the same command to go on" >&2
  fi
fi
exit "$code"
"""


def _directives(options: argparse.Namespace) -> list[str]:
    # jax gives process i of a node the i-th GPU it sees: every process has to see all
    # of them, so that nothing binds GPUs to tasks here.
    directives = [
        f"--job-name={options.name}",
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={options.gpus_per_node}",
        f"--gpus-per-node={options.gpus_per_node}",
        f"--time={options.time}",
        f"--signal=B:USR1@{options.grace_seconds}",
        "--requeue" if options.restarts else "--no-requeue",
        # A job that was queued again writes on at the end.
        "--open-mode=append",
        f"--output={options.name}-%j.log",
    ]
    for name in ("cpus_per_task", "partition", "account", "qos", "constraint"):
        value = getattr(options, name)
        if value is not None:
            directives.append(f"--{name.replace('_', '-')}={value}")
    return directives


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", type=_word, required=True, help="of the job")
    parser.add_argument("--nodes", type=at_least(1), required=True)
    parser.add_argument("--gpus-per-node", type=at_least(1), required=True)
    parser.add_argument(
        "--time", type=_time, required=True, help="limit, as 24:00:00 or 2-00:00:00"
    )
    parser.add_argument("--cpus-per-task", type=at_least(1), help="cores for a GPU")
    for name in ("partition", "account", "qos", "constraint"):
        parser.add_argument(f"--{name}", type=_word, help="as sbatch takes it")
    parser.add_argument(
        "--setup", help="shell command before the run, as module load or activate"
    )
    parser.add_argument(
        "--restarts",
        type=at_least(0),
        default=0,
        help="how often a stopped job is queued again",
    )
    parser.add_argument(
        "--grace-seconds",
        type=at_least(1),
        default=120,
        help="before the time limit, for the last checkpoint",
    )
    parser.add_argument(
        "--write", metavar="FILE", type=Path, help="write the script; submit nothing"
    )
    add_common(parser)
    return parser.parse_args(arguments)


def _word(value: str) -> str:
    # A line of #SBATCH ends at a space.
    if not re.fullmatch(r"[A-Za-z0-9_.,&|-]+", value):
        raise argparse.ArgumentTypeError(f"{value!r} has characters that sbatch minds")
    return value


def _time(value: str) -> str:
    if not re.fullmatch(r"\d+|(\d+-)?\d+(:\d\d){0,2}", value):
        raise argparse.ArgumentTypeError(
            f"{value!r} is no time limit: give minutes, hours:minutes:seconds or "
            "days-hours:minutes:seconds"
        )
    return value


if __name__ == "__main__":
    sys.exit(main(launch))
