"""What imports need, and which way they go."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

HEAVY = (
    "tensorflow", "tensorflow_datasets", "grain", "ml_collections", "cv2", "torch",
    "tensorboardX", "matplotlib", "sklearn",
)  # fmt: skip


def run_without(packages, program):
    blocked = "import sys\n" + "".join(f"sys.modules[{p!r}] = None\n" for p in packages)
    command = [sys.executable, "-c", blocked + program]
    subprocess.run(command, check=True, cwd=REPOSITORY)


def test_models_need_jax_and_flax_alone():
    # flax itself brings optax, orbax and rich along.
    run_without(
        HEAVY,
        "import resnet_jax, resnet_jax.models\nresnet_jax.create_model('resnet50')\n",
    )


@pytest.mark.parametrize(
    "module",
    [
        "resnet_jax.training.step",
        "resnet_jax.training.state",
        "resnet_jax.evaluation.evaluator",
    ],
)
def test_the_step_needs_no_data_library(module):
    run_without(
        HEAVY,
        f"import {module}\n",
    )


def test_the_command_line_is_parsed_without_jax():
    """Importing jax takes half a second, which --help should not."""
    run_without(
        ("jax", "jaxlib", "flax", *HEAVY),
        "import contextlib, io\n"
        "from resnet_jax.cli import main\n"
        "for line in ('--help', '--version', 'train --help', 'trian', 'plan --conf',\n"
        "             'detect train --help', 'detect predict --scor 1'):\n"
        "    with contextlib.redirect_stderr(io.StringIO()), "
        "contextlib.redirect_stdout(io.StringIO()):\n"
        "        try:\n            main(line.split())\n"
        "        except SystemExit:\n            pass\n",
    )


def test_public_names_are_there():
    import resnet_jax

    assert set(resnet_jax.__all__) == set(resnet_jax._LAZY) | {"UserError"}
    assert set(resnet_jax.__all__) <= set(dir(resnet_jax))
    for name in resnet_jax.__all__:
        assert getattr(resnet_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = resnet_jax.trian


ROOMS = (
    ("errors", "signals", "identity", "run_files", "options"),
    ("environment", "distributed", "storage", "parallel", "console"),
    ("models", "device_check"),
    ("config",),
    ("workdir", "checkpoints"),
    ("data",),
    ("weights", "prepare"),
    ("evaluation",),
    ("analysis", "export"),
    ("training",),
    ("detection",),
    ("targets", "plan", "paper", "doctor"),
    ("cli",),
)
"""From the ground up: a module imports its own room and the rooms before it."""


def test_imports_go_one_way():
    """Imports inside functions count too, so no late import hides a cycle."""
    rank = {name: index for index, rooms in enumerate(ROOMS) for name in rooms}
    wrong = []
    for file in sorted((REPOSITORY / "resnet_jax").rglob("*.py")):
        here = file.relative_to(REPOSITORY / "resnet_jax").with_suffix("").parts[0]
        if here in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "resnet_jax":
                rooms = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                rooms = str(node.module).split(".")[1:2] * node.module.startswith(
                    "resnet_jax."
                )
            else:
                continue
            wrong += [
                f"{file.name} of {here} imports {room}"
                for room in rooms
                if rank.get(room, 0) > rank[here]
            ]
    assert wrong == []
