"""The notebooks run from top to bottom, with fewer steps."""

import json

import pytest

import resnet_jax
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("file", sorted((REPOSITORY / "notebooks").glob("*.ipynb")))
def test_notebook_runs(file, tmp_path, tfds_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default_config = resnet_jax.default_config

    def config_of_the_tests():
        config = default_config()
        config.data.data_dir = tfds_dir
        return config

    monkeypatch.setattr(resnet_jax, "default_config", config_of_the_tests)
    names: dict = {}
    for cell in json.loads(file.read_text())["cells"]:
        if cell["cell_type"] == "code":
            lines = [line for line in cell["source"] if not line.startswith("%")]
            source = "".join(lines).replace("steps = 200", "steps = 4")
            exec(source.replace("warmup_steps = 20", "warmup_steps = 1"), names)
    assert names["summary"]["count"] == 360
    assert names["summary"]["errors"] == names["result"]["test_errors"]
