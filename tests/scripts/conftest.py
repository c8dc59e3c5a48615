"""The launch scripts as subprocesses, and tools in the place of the clouds' own."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"


def launch(script, arguments, *, path=os.devnull, timeout=60):
    """Runs a script; PATH has nothing but what is given: never a real cloud."""
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": path, "HOME": os.devnull},
        timeout=timeout,
    )


@pytest.fixture
def tools(tmp_path):
    """A folder for PATH, and a function that puts an executable script there."""
    folder = tmp_path / "tools"
    folder.mkdir()

    def add(name, text):
        tool = folder / name
        tool.write_text(text)
        tool.chmod(0o755)
        return folder

    return add
