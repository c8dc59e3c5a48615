"""Runs the notebooks from top to bottom and stores their outputs: ``make notebooks``.

python notebooks/execute.py [NOTEBOOK ...]
"""

import base64
import io
import json
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))


def execute(notebook: nbformat.NotebookNode, folder: str | Path) -> None:
    """Runs the cells in a fresh kernel; they write below ``folder``.

    The outputs are stored in the notebook, with paths relative to the folder.

    Raises:
      CellExecutionError: a cell failed.
    """
    nbclient.NotebookClient(
        notebook,
        timeout=1800,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            text = json.dumps(cell.outputs).replace(f"{folder}/", "")
            cell.outputs = [nbformat.from_dict(found) for found in json.loads(text)]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = _small(output.data["image/png"])


def _small(png: str) -> str:
    """A picture in base64 with 256 colours: a third of the bytes, for git."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    image.quantize(256).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:] or NOTEBOOKS):
        print(file.name, flush=True)
        content = nbformat.read(file, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(content, Path(folder).resolve())
        nbformat.write(content, file)
