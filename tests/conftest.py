"""Shared fixtures: 8 simulated devices, tiny configs and small data on the disk."""

import io
import os
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import rich.console

from resnet_jax.config import default_config

jax.config.update("jax_num_cpu_devices", 8)
# Tests give eight devices one program after another, and do not wait in between as the
# library does: twice the threads, lest collectives wait for each other's.
# See ``resnet_jax.parallel.settled``.
os.environ.setdefault("PJRT_NPROC", "16")
# Most of the tests' time is LLVM's: unoptimised code halves it. Programs, and so what
# is counted of them, are the same; the subprocesses of tests take this over.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
).strip()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Equal programs are compiled once a session, those of subprocesses included."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory) -> str:
    """Where the tests prepare the digits, once."""
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def tiny_config(tfds_dir):
    """Eight layers on the digits for 12 steps of 32; change it at will."""
    return make_tiny_config(tfds_dir)


def make_tiny_config(tfds_dir):
    config = default_config()
    config.model.name = "cifar_resnet8"
    config.data.name = "digits"
    config.data.data_dir = tfds_dir
    config.augmentation.pad = 1
    config.training.steps = 12
    config.training.global_batch_size = 32
    config.training.log_every_steps = 2
    config.evaluation.every_steps = 6
    config.checkpoint.every_steps = 4
    return config


def make_console():
    return rich.console.Console(file=io.StringIO(), width=200)


@pytest.fixture
def console():
    """A console that keeps what is printed, in ``console.file``."""
    return make_console()


@pytest.fixture
def image_folder(tmp_path):
    """train/ and test/ with 3 classes of random 12x10 PNG files: 18 and 6 images."""
    return write_image_folder(tmp_path / "images", per_class={"train": 6, "test": 2})


def write_image_folder(root, per_class, shape=(10, 12), classes=("ant", "bee", "cat")):
    rng = np.random.default_rng(0)
    for split, count in per_class.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
                cv2.imwrite(str(folder / f"{index}.png"), image)
    return root
