"""The process of ``resnet-jax`` and ``python -m resnet_jax``.

It listens to Ctrl-C before it imports anything slow, and it outlives the reader of its
output.
"""

import io
import os
import signal
import sys
from typing import Any, TextIO

from resnet_jax.signals import Listener, exit_now


def run() -> int:
    """Runs the command line; returns the exit status."""
    sys.stdout, sys.stderr = _unbreakable(sys.stdout), _unbreakable(sys.stderr)
    with Listener(_interrupted, [signal.SIGINT]):
        from resnet_jax.cli import main

        return main()


def _interrupted(_: int) -> None:
    exit_now(
        "stopped; the same command continues from the last checkpoint or shard, if "
        "there is one",
        128 + signal.SIGINT,
    )


def _unbreakable(stream: TextIO) -> TextIO:
    """The stream, but what it cannot encode is replaced, and a fault ends no run."""
    try:
        raw = _Unbreakable(stream.fileno(), "w", closefd=False)
    except (AttributeError, OSError):  # closed, or not a file
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=True,
    )


class _Unbreakable(io.FileIO):
    """Output that goes nowhere once it fails: a closed pipe, a full disk."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


if __name__ == "__main__":
    sys.exit(run())
