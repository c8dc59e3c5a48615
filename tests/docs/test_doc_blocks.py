"""Every code block of the pages runs, or is checked as far as it can be.

A page runs like a notebook: its Python and shell blocks in order, in one folder and one
namespace. ``REPLACED`` and ``SMALL`` say what is smaller than on the page, ``PARSED``
which commands are parsed but not run. Every ``resnet-jax`` command is also parsed as
it stands, and its config resolved. A block that is none of this fails the test.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from resnet_jax.cli import command_parser, main
from resnet_jax.cli.overrides import parse_overrides
from resnet_jax.config import Config, load_config, parse
from resnet_jax.paper.experiments import choose_runs, find_experiment
from tests.conftest import REPOSITORY
from tests.docs.pages import PAGES, blocks, commands, name_of
from tests.docs.stand_ins import make_stand_ins, use_stand_ins

REPLACED = {
    "resnet50": "resnet18",
    "resnet101": "resnet18",
    "resnet18_v1": "resnet18",
    "finetune:torchvision:resnet18": "finetune:torchvision:cifar_resnet8",
    "ten_crop": "ten_crop:size=64,shorter_side=72",
    "cifar_resnet56": "cifar_resnet8",
    "cifar_resnet20,cifar_plain20": "cifar_resnet8",
    "cifar_resnet20": "cifar_resnet8",
    "=0.05,0.1,0.2": "=0.05,0.1",
    "seeds=3": "seeds=1",
    "seeds=5": "seeds=2",
    "(3, 4, 23, 3)": "(2, 2, 3, 2)",
    "(1, 224, 224, 3)": "(1, 64, 64, 3)",
    "(2, 3, 224, 224)": "(2, 3, 64, 64)",
    "(2, 480, 640, 3)": "(2, 64, 96, 3)",
    "[[480, 640], [333, 500]]": "[[64, 96], [45, 70]]",
    '{"optimizer.learning_rate": "0.05"}': "small_digits",
    "checkpoints/600": "checkpoints/2",
    '"/runs/': '"{here}/runs/',
    "/data/": "{here}/data/",
}
"""Text of blocks and commands, and what stands in its place when they run."""

SMALL = {
    "digits": {
        "model.name": "cifar_resnet8",
        "training.steps": "2",
        "training.global_batch_size": "16",
        "training.log_every_steps": "1",
        "schedule.warmup_steps": "1",
        "evaluation.every_steps": "2",
        "checkpoint.every_steps": "2",
    },
    "finetune": {
        "data.image_size": "32",
        "data.eval_shorter_side": "36",
        "data.normalization": "imagenet",
        "training.epochs": "2",
        "training.global_batch_size": "8",
    },
    "detection/folder_voc": {
        "model.name": "resnet18",
        "data.shorter_side": "64",
        "data.longer_side": "96",
        "detector.anchor_sizes": "24,40",
        "detector.rpn_features": "16",
        "detector.train_candidates": "60",
        "detector.train_proposals": "20",
        "detector.test_candidates": "40",
        "detector.test_proposals": "10",
        "detector.roi_samples": "8",
        "detector.roi_size": "4",
        "training.epochs": "2",
    },
}
"""Fields that a real run of a config changes."""

PARSED = {
    r"detect train --config detection/(voc07|coco)": "minutes to compile",
    r"detect \S+ .*runs/boxes": "docs/detection.md runs the same commands",
    r"train --config (imagenet|recipes/)": "ImageNet recipes take minutes to compile",
    r"--compile tpu": "needs libtpu",
    r"paper (run|report)": "hours; tests/paper runs them small",
    r"--ensemble-config": "needs the runs of the paper",
    r"--coordinator|--distributed": "needs other hosts",
}
"""Commands that are parsed, their configs resolved, but not run; and why."""

SLOW = {
    "analysis.md",
    "detection.md",
    "evaluation.md",
    "from_pytorch.md",
    "models.md",
    "train.md",
}
"""Pages that only the slow tests run; ``test_blocks_are_valid`` has all."""

OPTIONAL = {"import torch": "torch", "torch.onnx": "onnxscript"}
"""Text of blocks that need a package which may be missing."""

NAMES = {
    "predict.md": """
views, classes = np.zeros((2, 64, 64, 3), np.uint8), [0, 1]
""",
}
"""Python that a page's reader would have run before, by page."""

CODE = [page for page in PAGES if blocks(page)]
PARSER = command_parser()


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    return make_stand_ins(tmp_path_factory.mktemp("stand_ins"), SMALL["digits"])


@pytest.mark.parametrize("page", CODE, ids=name_of)
def test_blocks_are_valid(page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, str(block), "exec")
        elif block.language == "sh":
            for words in commands(block.text):
                check(words)
        elif block.language == "json":
            json.loads(block.text)
        else:
            assert block.language == "text", f"{block}: what is {block.language!r}?"


PAGES_TO_RUN = [
    pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (page.name in SLOW))
    for page in CODE
]


@pytest.mark.parametrize("page", PAGES_TO_RUN)
def test_blocks_run(page, stand_ins, tmp_path, monkeypatch):
    use_stand_ins(stand_ins, page.read_text(), tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    digits = SMALL["digits"] | {"data.data_dir": str(tmp_path / "tfds")}
    namespace = {"__name__": page.stem, "small_digits": digits, "np": np}
    exec(NAMES.get(page.name, ""), namespace)
    for block in blocks(page):
        if block.language == "python":
            code = compile(replaced(block.text, tmp_path), str(block), "exec")
            needed = [name for text, name in OPTIONAL.items() if text in block.text]
            if all(map(importlib.util.find_spec, needed)):
                exec(code, namespace)
        elif block.language == "sh":
            for words in commands(block.text):
                run(words, tmp_path)


def replaced(text, here):
    for old, new in REPLACED.items():
        text = text.replace(old, new.format(here=here) if "{here}" in new else new)
    return text


def run(words, here):
    """Runs a command of ``resnet-jax`` that is short on stand-ins."""
    program, *arguments = words
    line = " ".join(words)
    if program == "resnet-jax" and not any(re.search(p, line) for p in PARSED):
        arguments = [replaced(word, here) for word in arguments]
        assert main([*arguments, *small_flags(arguments, here)]) == 0, line


def check(words):
    """Checks a command as it stands, without running it."""
    while "=" in words[0]:  # a variable set for this command
        words = words[1:]
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    assert program in CHECKS, f"how does one check {' '.join(words)}?"
    CHECKS[program](arguments)


def small_flags(arguments, here):
    """Flags that make a command short."""
    if arguments[0] == "evaluate":
        return ["--batch-size", "16"]
    if "--config" not in arguments:
        return []
    config = arguments[arguments.index("--config") + 1].partition(":")[0]
    fields = dict(SMALL.get(config, {}))
    if config == "digits":
        fields["data.data_dir"] = str(here / "tfds")
    given = {word.removeprefix("--config.").partition("=")[0] for word in arguments}
    small = {name: value for name, value in fields.items() if name not in given}
    return [f"--config.{name}={value}" for name, value in small.items()]


def check_resnet_jax(arguments):
    """Parses a command as it stands and resolves its config."""
    options, rest = PARSER.parse_known_args(arguments)
    overrides = parse_overrides(rest)
    assert not overrides or options.takes_overrides
    schema = getattr(options, "schema", Config)
    for name, text in overrides.items():
        parse(name, text, schema)
    if getattr(options, "config", None):
        load_config(options.config, overrides, schema)
    for grid in getattr(options, "grid", None) or ():
        name, _, values = grid.partition("=")
        for value in values.split(","):
            parse(name, value)
    if hasattr(options, "experiment"):
        choose_runs(
            find_experiment(options.experiment),
            (options.only or "").split(",") if options.only else (),
        )


def check_make(arguments):
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in arguments:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def check_pip(arguments):
    assert arguments[0] == "install"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    own = re.compile(
        rf"(?:\.|{project['name']})(?:\[([\w,]+)\])?(?: @ git\+https://\S+)?"
    )
    for word in arguments[1:]:
        if word in ("-e", "--no-deps"):
            continue
        found = own.fullmatch(word)
        assert found or word in ("jax", "flatbuffers", "libtpu", "xprof"), word
        for extra in (found[1] or "").split(",") if found else ():
            assert not extra or extra in project["optional-dependencies"], extra


def check_python(arguments):
    """``python -m MODULE`` has these options; the launcher prints what it would do."""
    if arguments[0] == "-m":
        path = REPOSITORY / arguments[1].replace(".", "/")
        is_package = path.is_dir()
        source = (
            path / "__main__.py" if is_package else path.with_suffix(".py")
        ).read_text()
        for flag in arguments[2:]:
            assert not flag.startswith("--") or f'"{flag}"' in source, flag
        return
    assert arguments[0] == "launch/launch.py"
    check_resnet_jax(arguments[arguments.index("--") + 1 :])
    if "--dry-run" in arguments:
        subprocess.run(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
        )


def check_docker(arguments):
    if arguments[0] == "build":
        assert (REPOSITORY / arguments[arguments.index("--file") + 1]).is_file()
    elif arguments[0] == "run":
        check_resnet_jax(arguments[arguments.index("train") :])
    else:
        assert arguments[0] == "push"


def check_files(arguments):
    """The paths of a tool exist."""
    for word in arguments:
        if not word.startswith("-") and word not in ("format", "check"):
            assert (REPOSITORY / word).exists(), word


CHECKS = {
    "resnet-jax": check_resnet_jax,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "docker": check_docker,
    **dict.fromkeys(("pytest", "ruff", "mypy"), check_files),
    "mpirun": lambda words: check_resnet_jax(words[words.index("resnet-jax") + 1 :]),
}
"""How to check a command, by its program."""
