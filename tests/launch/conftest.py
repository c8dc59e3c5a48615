"""The launcher as a subprocess, and programs in the place of the clouds' tools."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

LAUNCH = [sys.executable, str(REPOSITORY / "launch" / "launch.py")]


def launch(kind, arguments, *, path=os.devnull, timeout=60):
    """Runs the launcher; PATH has only what is given: never a real cloud."""
    return subprocess.run(
        [*LAUNCH, kind, *arguments],
        capture_output=True,
        text=True,
        env={"PATH": path, "HOME": os.devnull},
        timeout=timeout,
    )


@pytest.fixture
def tools(tmp_path):
    """A function that puts an executable into a folder for PATH, which it returns."""
    folder = tmp_path / "tools"
    folder.mkdir()

    def add(name, text):
        tool = folder / name
        tool.write_text(text)
        tool.chmod(0o755)
        return folder

    return add
