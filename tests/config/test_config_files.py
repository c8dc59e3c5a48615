"""Config files are Python: whatever they do ends in a config or in one sentence."""

import os
import sys

import pytest

from resnet_jax.config import load_config
from resnet_jax.errors import UserError

HEAD = """from __future__ import annotations
import dataclasses
from resnet_jax.config import default_config
"""
BODY = """
def get_config():
    config = default_config()
    config.training.steps = 10
    return config
"""


def refusal(spec, overrides=None):
    with pytest.raises(UserError) as error:
        load_config(str(spec), overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_runs_as_a_module(tmp_path):
    """Dataclasses with annotations as text look it up in sys.modules."""
    path = tmp_path / "json.py"  # a name of the standard library
    path.write_text(
        HEAD + "@dataclasses.dataclass\nclass Recipe:\n    steps: int = 7\n"
        "    rest: dataclasses.InitVar[int] = 0\n"
        "import sys\nassert sys.modules[__name__].Recipe is Recipe\n"
        "assert __spec__.origin == __file__\n" + BODY.replace("10", "Recipe().steps")
    )
    json = sys.modules["json"]
    assert load_config(str(path)).training.steps == 7
    assert sys.modules["json"] is json
    assert not (tmp_path / "__pycache__").exists()


def test_a_file_imports_the_modules_beside_it(tmp_path):
    """Files of two folders may have different neighbours of the same name."""
    before, modules = list(sys.path), set(sys.modules)
    for steps in (7, 8):
        folder = tmp_path / str(steps)
        (folder / "package").mkdir(parents=True)
        (folder / "neighbour.py").write_text(f"STEPS = {steps}\n")
        (folder / "package" / "__init__.py").write_text("from package import inner\n")
        (folder / "package" / "inner.py").write_text("from neighbour import STEPS\n")
        lazily = "    import package\n    config.training.steps = package.inner.STEPS\n"
        body = BODY.replace("    config.training.steps = 10\n", lazily)
        (folder / "mine.py").write_text(HEAD + "import neighbour\n" + body)
        assert load_config(f"{folder}/mine.py").training.steps == steps
    assert sys.path == before
    assert not {"neighbour", "package", "package.inner"} & (set(sys.modules) - modules)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(HEAD + BODY)
    assert load_config("~/mine.py").training.steps == 10
    assert "no home folder" in refusal("~nobody-here/mine.py")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
        ("import sys\ndef get_config():\n    sys.exit()\n", "line 3: SystemExit"),
        ("def get_config(:\n", "line 1: SyntaxError"),
        ("raise BaseException('a\\nb')\n", "line 1: BaseException: a"),
        ("class E(Exception):\n    __str__ = 1\nraise E\n", "line 3: "),
        ("def f():\n    f()\nf()\n", "RecursionError"),
        ("raise KeyboardInterrupt2\n", "line 1: NameError"),
        ("x = 1\n", "defines no function get_config()"),
        ("get_config = 5\n", "defines no function get_config()"),
        ("def get_config():\n    pass\n", "must return a ConfigDict"),
        ("def get_config():\n    return 5\n", "default_config(), not int"),
        ("def get_config(net):\n    pass\n", "missing a required argument: 'net'"),
        ("def get_config(a, b):\n    pass\n", "get_config(a, b) is called with"),
        ("get_config = type\n", "mine.py"),
        (b"\x89PNG\r\n\x00\x00", "mine.py"),
        (b"x = '\xff'\n", "mine.py"),
        (b"", "defines no function"),
        (b"#" * (2**24 + 1), "more than 16 MiB"),
    ],
)
def test_a_faulty_file_is_one_sentence(tmp_path, source, sentence):
    path = tmp_path / "mine.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    assert sentence in refusal(path)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("config.data = 5", "config field data is a section"),
        ("config.training = 5", "TypeError"),
        ("del config.training", "KeyError"),
        ("config.data.name = config", "RecursionError"),
        ("config = ml_collections.ConfigDict()", "KeyError"),
        ("config.seed = ml_collections.config_dict.placeholder(int)", "takes an"),
        ("config.seed = lambda: 5", "takes an integer, not <function"),
    ],
)
def test_a_config_without_sense_is_one_sentence(tmp_path, line, sentence):
    path = tmp_path / "mine.py"
    body = BODY.replace("    return", f"    {line}\n    return")
    path.write_text(f"{HEAD}import ml_collections\n{body}")
    assert sentence in refusal(path, {"training.steps": "3"})


def test_a_frozen_config_takes_overrides(tmp_path):
    path = tmp_path / "mine.py"
    frozen = "return __import__('ml_collections').FrozenConfigDict(config)"
    path.write_text(HEAD + BODY.replace("return config", frozen))
    assert load_config(str(path), {"training.steps": "5"}).training.steps == 5


def test_what_is_no_file_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "folder.py").mkdir()
    for name, sentence in (
        (tmp_path / "pipe.py", "it is not a regular file"),
        (tmp_path / "folder.py", "cannot be read"),
        ("/dev/zero", "it is not a regular file"),
        (tmp_path / ("a" * 5000), "does not exist"),
        ("", "must not be empty"),
        ("a\0b.py", "NUL character"),
        ("http://x/mine.py", "is a URL"),
        ("gs://x/mine.py:net", "is a URL"),
        (tmp_path / "mine.py:net", "does not exist"),
    ):
        assert sentence in refusal(name)
