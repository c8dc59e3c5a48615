"""The reference pages, which come from the code, and the whole site."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

import resnet_jax
from resnet_jax import detection
from resnet_jax.cli import command_parser
from resnet_jax.config import DetectionConfig, fields, list_configs
from resnet_jax.models.catalog import CATALOG
from tests.conftest import REPOSITORY
from tests.docs.pages import DOCS


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_references_are_complete(hooks):
    made = {name: make() for name, make in hooks.GENERATED.items()}
    for field in fields().values():
        assert f"| `{field.name}` | `{field.default}` |" in made["fields"]
        assert field.meaning.replace("|", "\\|") in made["fields"]
    for name, field in fields(DetectionConfig).items():
        row = f"| `{name}` | `{field.default}` |"
        assert row in made["detection_fields"] or field == fields()[name], name
    assert "`optimizer.kind`" not in made["detection_fields"]
    for name, entry in CATALOG.items():
        assert f"| `{name}` | " in made["nets"]
        assert f" {entry.parameters:,} |" in made["nets"]
    assert (
        "| `resnet50_v1` | 22.85 | He et al. 2015, Table 3 | 10-crop |" in made["nets"]
    )
    for name, first_line in list_configs().items():
        assert f"`{name}`" in made["configs"]
        assert first_line in made["configs"]
    for flag in re.findall(r"--[a-z][a-z-]+", command_parser().format_help()):
        assert flag in ("--version", "--help", *made["commands"].split())
    for command in ("train", "paper run", "benchmark step", "detect train"):
        assert f"## {command}\n" in made["commands"]
    for name in resnet_jax.__all__:
        assert f".{name}\n" in made["python"]
    for name in (*detection.__all__, "nms", "roi_align", "train_localizer"):
        assert f".{name}\n" in made["python_detection"]
    assert "| `optimizer.kind` |  |  |  | lamb | lamb | lamb |  |" in made["recipes"]


def test_every_marker_has_a_maker_and_every_maker_a_page(hooks):
    text = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    assert set(re.findall("<!-- generated: (.*?) -->", text)) == set(hooks.GENERATED)


def test_no_cell_breaks_a_table(hooks):
    for line in hooks.table(("a", "b"), [("1|2", "x")]).splitlines():
        assert len(re.findall(r"(?<!\\)\|", line)) == 3


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_without_the_network(tmp_path):
    pytest.importorskip("material")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "JAX_PLATFORMS": "cpu",
            "https_proxy": "http://127.0.0.1:9",  # nothing listens there
        },
        check=True,
    )
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        html = page.read_text()
        loaded = re.findall(
            r"<(?:script|img|link)[^>]+(?:src|href)=\"?(https?://[^\s\">]+)", html
        )
        assert not loaded, page
        assert "<!-- generated" not in html
    assert (
        "optimizer.learning_rate"
        in (tmp_path / "reference/fields/index.html").read_text()
    )
    assert "num_classes" in (tmp_path / "reference/python/index.html").read_text()
