"""Cases of a measurement, each in a process of its own, since XLA reads flags once."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


@functools.cache
def knows(flags: str) -> bool:
    """Whether this jaxlib starts with these XLA flags, which are added to the set ones.

    It reads those of GPUs on a machine without one too.
    """
    if not flags:
        return True
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    variables = _environment(flags) | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=variables, capture_output=True, check=False)
    return not done.returncode


def run(
    module: str, arguments: Sequence[str], flags: str, seconds: float
) -> tuple[list[dict[str, Any]], str]:
    """The lines of JSON that a script prints, and why there are no more.

    Args:
      module: the script's name in this folder.
      arguments: its command line.
      flags: of XLA, added to those that are set.
      seconds: after which it is stopped, with all that it has started.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        env=_environment(flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
        fault = _last_line(errors) if process.returncode else "no result"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        fault = "not measured: out of time"
    rows = [json.loads(line) for line in output.splitlines() if line[:1] == "{"]
    return rows, fault


def _environment(flags: str) -> dict[str, str]:
    before = os.environ.get("XLA_FLAGS", "")
    return os.environ | {"XLA_FLAGS": f"{before} {flags}".strip()}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["failed without a word"])[-1][:300]
