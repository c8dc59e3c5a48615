"""The notebooks run from top to bottom, and the outputs they store are fit to read."""

import base64
import json
import os
import re

import nbformat
import pytest

from notebooks.execute import NOTEBOOKS, execute
from tests.conftest import REPOSITORY

TINY = {
    "01_quickstart": {"STEPS": 20},
    "02_pretrained": {"STEPS": 10, "PER_CLASS": 20},
    "03_degradation": {"STEPS": 20, "DEPTHS": (8, 14)},
    "04_your_images": {"STEPS": 10, "BASE_PER_CLASS": 10, "EPOCHS": 2},
    "05_blocks_in_your_project": {"STEPS": 5, "LAYERS": 3, "SEGMENTER_STEPS": 5},
    "06_scaling": {"STEPS": 2, "NET": "cifar_resnet8", "COUNTS": (1, 2)},
    "07_detection": {"STEPS": 15},
}
"""Values of the constants that begin a line, such as ``STEPS = 200``."""

ADDRESS = (
    "https://colab.research.google.com/github/OWNER/resnet_jax/blob/main/notebooks"
)
MOST_BYTES = 1_500_000
OF_A_MACHINE = re.compile(r"/(tmp|home|root|work|Users|private|var|usr)/|/content/")
INSTALL = "deep-residual-jax[demo] @ git+https://github.com/OWNER/resnet_jax"

each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def all_outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def with_tiny_settings(notebook, constants):
    for name, value in constants.items():
        changed = 0
        for cell in code_cells(notebook):
            cell.source, count = re.subn(
                rf"(?m)^{name} = .*$", f"{name} = {value!r}", cell.source
            )
            changed += count
        assert changed == 1, f"one line must begin {name} = "


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_runs(file, tmp_path, tfds_dir, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    # Nothing is downloaded: this port is closed.
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = nbformat.read(file, as_version=4)
    with_tiny_settings(notebook, TINY[file.stem])
    execute(notebook, tmp_path)  # raises what a cell raises
    assert any("image/png" in o.get("data", {}) for o in all_outputs(notebook))


@each_notebook
def test_a_badge_and_an_install_cell(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert f"({ADDRESS}/{file.name})" in first.source
    installs = [c.source for c in code_cells(notebook) if "%pip" in c.source]
    assert len(installs) == 1
    assert installs[0].startswith("try:\n    import resnet_jax\nexcept ImportError:")
    assert INSTALL in installs[0]
    assert "resnet_jax.__version__" in installs[0]
    assert "jax.devices()" in installs[0]


@each_notebook
def test_stored_outputs(file):
    notebook = nbformat.read(file, as_version=4)
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run make notebooks"
    outputs = all_outputs(notebook)
    pictures = [
        output.data["image/png"]
        for output in outputs
        if output.output_type in ("execute_result", "display_data")
        and "image/png" in output.data
    ]
    assert len(pictures) >= 2
    for picture in pictures:
        assert base64.b64decode(picture).startswith(b"\x89PNG")
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        if output.output_type != "stream":
            output = {k: v for k, v in output.data.items() if k != "image/png"}
        text = json.dumps(output)
        assert not OF_A_MACHINE.search(text), text
        assert "Warning" not in text
        assert "\\u001b" not in text


def test_stored_outputs_are_small():
    assert sum(file.stat().st_size for file in NOTEBOOKS) < MOST_BYTES
