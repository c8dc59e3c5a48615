"""The process around a command."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import HEED_CTRL_C, REPOSITORY

CHATTY = """
import sys
from resnet_jax.__main__ import _unbreakable
out = _unbreakable(sys.stdout)
for _ in range(1000):
    print("\\N{MIDDLE DOT}" * 1000, file=out)
print("went on to the end", file=sys.stderr)
"""


@pytest.mark.parametrize("reader", ["leaves", "full disk"])
def test_output_that_cannot_be_written_ends_no_run(reader):
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", CHATTY],
            env=dict(os.environ, PYTHONPATH=str(REPOSITORY), PYTHONIOENCODING="ascii"),
            stdout=write if reader == "leaves" else full,
            stderr=subprocess.PIPE,
            text=True,
        )
    os.close(write)
    assert (process.returncode, process.stderr) == (0, "went on to the end\n")


@pytest.mark.parametrize("seconds", [0.2, 0.6])
def test_ctrl_c_among_the_imports_prints_no_traceback(seconds):
    process = subprocess.Popen(
        [*HEED_CTRL_C, sys.executable, "-m", "resnet_jax", "summary", "resnet152"],
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.startswith("resnet-jax: stopped;")
    assert errors.count("\n") == 1
