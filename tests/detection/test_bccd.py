"""The demo of configs/detection/bccd.py on its real data."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.detection.layouts import needs_real_data, real

FLOOR = 0.70
"""Below the worst of three seeds, see benchmarks/notes.md."""


@needs_real_data
@pytest.mark.slow
def test_bccd_reaches_the_floor(tmp_path):
    # A process of its own: one device, and programs that XLA optimises.
    command = [sys.executable, "-m", "resnet_jax", "detect", "train"]
    command += ["--config", "detection/bccd", "--workdir", str(tmp_path / "run")]
    command += [f"--config.data.path={real('BCCD')}"]
    environment = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run(command, check=True, cwd=REPOSITORY, env=environment)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["voc"]["map_area"] > FLOOR
