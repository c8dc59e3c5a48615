"""What an import needs: other projects take the blocks with two packages alone."""

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


def test_public_names_are_there():
    import resnet_jax

    for name in resnet_jax.__all__:
        assert getattr(resnet_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = resnet_jax.trian
