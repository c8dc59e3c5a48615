"""Flags for a run on several hosts; see ``resnet_jax.distributed``."""

import argparse
import contextlib
import os
from typing import TYPE_CHECKING

from resnet_jax.cli.arguments import MOST_COUNT, whole
from resnet_jax.errors import UserError

if TYPE_CHECKING:
    from resnet_jax.distributed import Processes

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --processes, --process-id and --distributed."""
    group = parser.add_argument_group(
        "several hosts",
        "Run the same command on each. The environment variables "
        f"{', '.join(_VARIABLES)} replace the first three flags.",
    )
    add = group.add_argument
    add("--coordinator", metavar="HOST:PORT", help="address of process 0")
    count, index = whole(1, MOST_COUNT), whole(0, MOST_COUNT - 1)
    add("--processes", type=count, metavar="N", help="number of processes")
    add("--process-id", type=index, metavar="I", help="number of this process, from 0")
    add(
        "--distributed",
        action="store_true",
        help="let jax find all three: on TPUs, in Slurm, Open MPI and GKE",
    )


def connected(
    options: argparse.Namespace, peer_timeout_seconds: int = 60
) -> contextlib.AbstractContextManager[None]:
    """Connects this process as the flags say; see ``distributed.started``."""
    from resnet_jax.distributed import started

    return started(_processes(options), peer_timeout_seconds)


def _processes(options: argparse.Namespace) -> "Processes | None":
    from resnet_jax.distributed import Processes

    flags = (options.coordinator, options.processes, options.process_id)
    if options.distributed:
        if any(flag is not None for flag in flags):
            raise UserError(
                "give --distributed, or --coordinator, --processes and --process-id, "
                "but not both"
            )
        return Processes()
    coordinator, count, index = (
        os.environ.get(name) if flag is None else flag
        for flag, name in zip(flags, _VARIABLES, strict=True)
    )
    if coordinator is None and count is None and index is None:
        return None
    processes = Processes(coordinator, _integer(count, 1), _integer(index, 0))
    processes.check()
    return processes


def _integer(value: int | str | None, least: int) -> int | None:
    try:
        return None if value is None else whole(least, MOST_COUNT)(str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{_VARIABLES[1 + (least == 0)]} {error}") from None
