r"""Starts one resnet-jax command as several processes on this machine.

    python scripts/launch_local.py --processes 2 -- \
        train --config configs/digits.py --workdir runs/two

The processes are real ones that talk over loopback, each with its own part of every
batch: the first thing to try before many hosts. All output comes here; process 0
writes that of the run. Where one fails, the others stop by themselves, and the exit
status is that of the first that failed. Signals are passed on to all.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

POLL_SECONDS = 0.1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="simulated CPU devices of each process (default: 1)",
    )
    parser.add_argument(
        "--port", type=int, metavar="P", help="of process 0 (default: a free one)"
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="give process I the GPU number I, instead of CPU devices",
    )
    parser.add_argument("command", nargs="+", help="what follows resnet-jax, after --")
    options = parser.parse_args(arguments)
    if options.processes < 1 or options.devices < 1:
        parser.error("--processes and --devices are at least 1")
    port = options.port or free_port()
    processes = [
        start(options.command, index, port, options)
        for index in range(options.processes)
    ]
    forward_signals(processes)
    return wait(processes)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    command: Sequence[str], index: int, port: int, options: argparse.Namespace
) -> subprocess.Popen:
    """Starts the process of that number."""
    environment = dict(os.environ)
    if options.gpu:
        environment["CUDA_VISIBLE_DEVICES"] = str(index)
    else:
        environment["JAX_PLATFORMS"] = "cpu"
        environment["JAX_NUM_CPU_DEVICES"] = str(options.devices)
    flags = [
        f"--coordinator=127.0.0.1:{port}",
        f"--processes={options.processes}",
        f"--process-id={index}",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "resnet_jax", *command, *flags],
        env=environment,
    )


def forward_signals(processes: Sequence[subprocess.Popen]) -> None:
    """Passes SIGTERM on to all; a terminal's Ctrl-C reaches them by itself."""

    def forward(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def wait(processes: Sequence[subprocess.Popen]) -> int:
    """The status of the first process that fails, or 0, once all have ended."""
    failed = 0
    while any(process.poll() is None for process in processes):
        failed = failed or next((p.poll() for p in processes if p.poll()), 0) or 0
        time.sleep(POLL_SECONDS)
    failed = failed or next((p.returncode for p in processes if p.returncode), 0)
    return failed if failed >= 0 else 128 - failed


if __name__ == "__main__":
    sys.exit(main())
