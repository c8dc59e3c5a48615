"""Measures the training step; see ``benchmark_step``."""

import dataclasses
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from resnet_jax import parallel
from resnet_jax.analysis.complexity import count_multiply_adds
from resnet_jax.config import Config, derive
from resnet_jax.config.schema import AugmentationConfig, TrainingConfig
from resnet_jax.data.batch import Batch
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.errors import UserError
from resnet_jax.models import catalog_entry, create_model
from resnet_jax.training.environment import environment
from resnet_jax.training.optimizer import make_optimizer
from resnet_jax.training.progress import say
from resnet_jax.training.schedule import Schedule
from resnet_jax.training.state import TrainState, init_state, state_shardings
from resnet_jax.training.step import TrainStep, make_train_step

CIFAR_AUGMENTATION = AugmentationConfig(pad=4, flip=True)
IMAGENET_AUGMENTATION = AugmentationConfig(flip=True, color_noise=0.1)


def benchmark_step(
    model: str = "cifar_resnet20",
    *,
    batch_size: int = 128,
    image_size: int | None = None,
    dtype: str = "float32",
    steps: int = 20,
    json_path: str | None = None,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Times the jitted training step of a net on random images on the device.

    Args:
      model: a name of the catalog.
      batch_size: global batch.
      image_size: side of the images; the net's own by default.
      dtype: of the convolutions.
      steps: timed steps, each waited for.
      json_path: where to write the result, if anywhere.
      console: where to print; standard output by default.

    Returns:
      images_per_second and milliseconds (medians), compile_seconds, peak memory and
      multiply-adds a second: those of the forward pass times three, by custom.

    Raises:
      UserError: an unknown net, or a batch that the devices cannot share.
    """
    if batch_size < 1 or steps < 1 or (image_size is not None and image_size < 1):
        raise UserError("--batch, --steps and --image-size must be at least 1")
    console = console or rich.console.Console()
    side = image_size or catalog_entry(model).image_size
    train_step, state, batch = synthetic_step(model, batch_size, side, dtype)
    start = time.perf_counter()
    compiled = train_step.lower(state, None, batch).compile()
    compile_seconds = time.perf_counter() - start
    for _ in range(2):
        state = compiled(state, None, batch)
    seconds = []
    for _ in range(steps):
        jax.block_until_ready(state)
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(state, None, batch))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    net = create_model(model)
    forward = count_multiply_adds(net, (side, side, 3))
    result = {
        "model": model,
        "batch_size": batch_size,
        "image_size": side,
        "dtype": dtype,
        "images_per_second": batch_size / median,
        "milliseconds": 1000 * median,
        "milliseconds_min": 1000 * min(seconds),
        "milliseconds_max": 1000 * max(seconds),
        "steps": steps,
        "compile_seconds": compile_seconds,
        **_peak_memory(),
        "multiply_adds_per_second": 3 * forward * batch_size / median,
        "environment": environment(),
    }
    _print(console, result)
    if json_path is not None:
        write_json(json_path, result)
    return result


def synthetic_step(
    model: str,
    batch_size: int,
    image_size: int,
    dtype: str,
    augmentation: AugmentationConfig | None = None,
    micro_batches: int = 1,
    fully_sharded: bool = False,
    devices: int | None = None,
    abstract: bool = False,
    **model_options: Any,
) -> tuple[TrainStep, TrainState, Batch]:
    """A training step with the state and batch to call it on: (state, None, batch).

    ``augmentation`` is by default the paper's for the net, as far as it is done on the
    device; ``micro_batches`` and ``fully_sharded`` are the config's fields, and
    ``model_options`` are ``create_model``'s. ``devices`` is their number, all by
    default. ``abstract`` gives shapes in place of the state's and the batch's arrays,
    to compile the step and not to run it.
    """
    mesh = parallel.data_mesh(devices)
    parallel.check_divides(batch_size, mesh.size, micro_batches)
    entry = catalog_entry(model)
    is_small = entry.image_size <= 32
    net = create_model(model, dtype=jnp.dtype(dtype), **model_options)
    config = dataclasses.replace(
        Config(),
        augmentation=augmentation
        or (CIFAR_AUGMENTATION if is_small else IMAGENET_AUGMENTATION),
        training=TrainingConfig(
            global_batch_size=batch_size, micro_batches=micro_batches
        ),
    )
    schedule = Schedule(config.optimizer, config.schedule, derive(config, batch_size))
    optimizer = make_optimizer(config.optimizer)
    shape = (image_size, image_size, entry.channels)
    rng = np.random.default_rng(0)
    statistics_shape = shape if is_small else (1, 1, entry.channels)
    pixels = PixelStatistics(
        np.full(statistics_shape, 0.5, np.float32),
        np.ones(statistics_shape, np.float32),
    )

    def init() -> TrainState:
        return init_state(net, optimizer, schedule, pixels, shape, 0, averaged=False)

    shardings = state_shardings(jax.eval_shape(init), mesh, fully_sharded)
    train_step = make_train_step(net, optimizer, schedule, config, mesh, shardings)
    if abstract:
        given = {
            "image": jax.ShapeDtypeStruct((batch_size, *shape), jnp.uint8),
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        }
        return train_step, jax.eval_shape(init), given
    state = jax.jit(init, out_shardings=shardings)()
    batch = {
        "image": rng.integers(0, 256, (batch_size, *shape), dtype=np.uint8),
        "label": rng.integers(0, entry.num_classes, batch_size).astype(np.int32),
    }
    return train_step, state, parallel.place(batch, parallel.batch_sharding(mesh))


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes a measurement.

    Raises:
      UserError: the file cannot be written.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str, text: str) -> None:
    """Writes a file.

    Raises:
      UserError: it cannot be written.
    """
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error


def _peak_memory() -> dict[str, Any]:
    """Peak bytes on the first device or, where it does not tell, of the process."""
    memory = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        return {"peak_bytes": memory["peak_bytes_in_use"], "peak_of": "device"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_bytes": peak * unit, "peak_of": "process"}


def _print(console: rich.console.Console, result: dict[str, Any]) -> None:
    devices = result["environment"]["devices"]
    say(
        console,
        f"{result['model']}, batch {result['batch_size']}, "
        f"{result['image_size']} px, {result['dtype']}, {devices}",
    )
    mebibytes = result["peak_bytes"] / 2**20
    lines = {
        "images a second": f"{result['images_per_second']:,.0f}",
        "milliseconds a step": f"{result['milliseconds']:.2f} (median of "
        f"{result['steps']}; {result['milliseconds_min']:.2f} to "
        f"{result['milliseconds_max']:.2f})",
        "compile time": f"{result['compile_seconds']:.1f} s",
        f"peak memory ({result['peak_of']})": f"{mebibytes:,.0f} MiB",
        "multiply-adds a second": f"{result['multiply_adds_per_second'] / 1e9:,.1f} G "
        "(3 x forward)",
    }
    for name, value in lines.items():
        say(console, f"  {name:<24}{value}")
