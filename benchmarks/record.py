"""What every measurement writes beside its figures: when, where and with what."""

import json
import os
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resnet_jax.environment import environment

_VARIABLES = ("XLA_FLAGS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "JAX_PLATFORMS")
"""Environment variables that change the speed."""


def circumstances(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Date, command, versions and hardware; call it before anything is measured.

    Args:
      script: name of the script's module in this folder.
      arguments: its command line.
    """
    return {
        "benchmark": script,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"benchmarks.{script}", *arguments]),
        "environment": {
            **environment(),
            "variables": {
                name: os.environ[name] for name in _VARIABLES if name in os.environ
            },
            # Above zero on a quiet machine only by what this process has done so far.
            "load_average_before": round(os.getloadavg()[0], 2),
        },
    }


def write(path: str | None, content: dict[str, Any]) -> None:
    """Writes a measurement as JSON; does nothing without a path."""
    if path is None:
        return
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


def positive(text: str) -> int:
    """A command line's count, which is at least 1; for argparse."""
    count = int(text)
    if count < 1:
        raise ValueError
    return count
