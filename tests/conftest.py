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
# Tests dispatch programs to eight devices without waiting in between, as the library
# does. With twice the threads, collectives cannot block each other; see
# ``resnet_jax.parallel.settled``.
os.environ.setdefault("PJRT_NPROC", "16")
# Compiling takes most of the tests' time, and these flags cut it to a third.
# Subprocesses inherit them.
FAST_COMPILE = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # Later versions of XLA do not know the flag.
    FAST_COMPILE.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FAST_COMPILE])


REPOSITORY = Path(__file__).parent.parent

# All workers, subprocesses and later runs share compiled programs.
COMPILED = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs",
    float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)


@pytest.fixture(scope="module", autouse=True)
def free_memory():
    """Frees the programs of a test file: a worker would gather gigabytes of them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory) -> str:
    """Where the tests prepare the digits, once."""
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def tiny_config(tfds_dir):
    """Eight layers on the digits for 12 steps of 32; change it at will."""
    return make_tiny_config(tfds_dir)


HEED_CTRL_C = ("env", "--default-signal=INT")
"""Begins a command. Tests may run in the background, where Ctrl-C is ignored."""


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
