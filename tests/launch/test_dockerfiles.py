"""What can be said of the images without building them."""

import json
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def instructions(name):
    text = (REPOSITORY / "docker" / name).read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(None, 1) for line in text.splitlines() if line.strip()]


def values(name, keyword):
    return [rest for word, rest in instructions(name) if word == keyword]


BOTH = pytest.mark.parametrize(
    ("name", "extra"), [("gpu.Dockerfile", "cuda13"), ("tpu.Dockerfile", "tpu")]
)


@BOTH
def test_the_base_is_pinned_and_new_enough(name, extra):
    (base,) = values(name, "FROM")
    version = re.fullmatch(r"python:(\d+\.\d+\.\d+)-slim-[a-z]+", base)[1]
    assert version in SpecifierSet(PROJECT["requires-python"])


@BOTH
def test_what_is_copied_exists_and_reaches_the_builder(name, extra):
    allowed = (REPOSITORY / ".dockerignore").read_text().splitlines()
    copied = [word for rest in values(name, "COPY") for word in rest.split()[:-1]]
    assert {"pyproject.toml", "resnet_jax", "configs"} <= set(copied)
    for source in copied:
        assert (REPOSITORY / source).exists()
        assert f"!{source}" in allowed
    # The build of the package reads these.
    assert PROJECT["readme"] in copied


@BOTH
def test_extras_exist_and_jax_is_of_a_version_that_is_asked_for(name, extra):
    (install,) = [run for run in values(name, "RUN") if "pip install" in run]
    (extras,) = re.findall(r'"\.\[(.*?)\]"', install)
    assert extras.split(",") == [extra, "gcs"]
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert f'"jax[{extra}]==${{JAX_VERSION}}"' in install
    (version,) = [
        arg.partition("=")[2]
        for arg in values(name, "ARG")
        if arg.startswith("JAX_VERSION")
    ]
    requirements = [Requirement(text) for text in PROJECT["dependencies"]]
    for library in ("jax", "jaxlib"):
        (wanted,) = [r.specifier for r in requirements if r.name == library]
        assert version in wanted


@BOTH
def test_the_command_is_resnet_jax_itself(name, extra):
    (entrypoint,) = values(name, "ENTRYPOINT")
    assert json.loads(entrypoint) == ["resnet-jax"]
    assert "resnet-jax" in PROJECT["scripts"]


def test_the_gpu_image_is_not_root_when_it_runs():
    words = [word for word, _ in instructions("gpu.Dockerfile")]
    (user,) = values("gpu.Dockerfile", "USER")
    assert user != "root"
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert "RUN" not in words[words.index("USER") :]
