"""Speed of training steps, inference and the input pipeline on this machine."""

import contextlib
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from resnet_jax import distributed, parallel
from resnet_jax.analysis.complexity import count_multiply_adds
from resnet_jax.config import Config
from resnet_jax.config.schema import (
    AugmentationConfig,
    DataConfig,
    ModelConfig,
    TrainingConfig,
)
from resnet_jax.console import describe, make_console, print_facts
from resnet_jax.data.batch import Batch
from resnet_jax.data.feeds import make_feed
from resnet_jax.data.sources import open_collection
from resnet_jax.data.split import Split
from resnet_jax.data.transforms import PixelStatistics, normalize, to_unit
from resnet_jax.environment import environment
from resnet_jax.errors import UserError
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.export import folded, image_shape
from resnet_jax.models import catalog_entry, create_model
from resnet_jax.training.state import Learner, TrainState, make_learner
from resnet_jax.training.step import make_train_step

CIFAR_AUGMENTATION = AugmentationConfig(pad=4, flip=True)
IMAGENET_AUGMENTATION = AugmentationConfig(flip=True, color_noise=0.1)
_SMALL_SIDE = 32


def synthetic_learner(
    model: str,
    batch_size: int,
    *,
    image_size: int | None = None,
    dtype: str = "float32",
    augmentation: AugmentationConfig | None = None,
    micro_batches: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    **model_options: Any,
) -> Learner:
    """A learner for a net of the catalog on made-up data.

    Args:
      model: a name of the catalog.
      batch_size: global batch.
      image_size: side of the images; by default the net's own.
      dtype: of the convolutions.
      augmentation: by default the paper's for the net, without the host's crops.
      micro_batches: the config's ``training.micro_batches``.
      mesh: the devices; all by default.
      **model_options: other fields of the config's ``model`` section.
    """
    entry = catalog_entry(model)
    side = image_size or entry.image_size
    is_small = entry.image_size <= _SMALL_SIDE
    default = CIFAR_AUGMENTATION if is_small else IMAGENET_AUGMENTATION
    config = Config(
        model=ModelConfig(name=model, dtype=dtype, **model_options),
        data=DataConfig(normalization="per_pixel_mean" if is_small else "per_channel"),
        augmentation=augmentation or default,
        training=TrainingConfig(
            steps=10**6, global_batch_size=batch_size, micro_batches=micro_batches
        ),
    )
    return make_learner(
        config,
        mesh or parallel.data_mesh(),
        num_examples=batch_size,
        num_classes=entry.num_classes,
        image_shape=(side, side, entry.channels),
    )


def synthetic_inputs(learner: Learner) -> tuple[TrainState, Batch]:
    """A first state and a random batch, to call ``make_train_step(learner)`` on."""
    shape = learner.image_shape
    per_pixel = learner.config.data.normalization == "per_pixel_mean"
    pixels = np.ones(shape if per_pixel else (1, 1, shape[-1]), np.float32)
    state = learner.fresh_state(PixelStatistics(mean=0.5 * pixels, std=pixels))
    size = learner.config.training.global_batch_size
    num_classes: int = getattr(learner.model, "num_classes", 2)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (size, *shape), dtype=np.uint8),
        "label": rng.integers(0, num_classes, size).astype(np.int32),
    }
    return state, parallel.place(batch, parallel.batch_sharding(learner.mesh))


def abstract_batch(learner: Learner) -> Batch:
    """Shapes, dtypes and shardings of a streamed batch, to compile a step."""
    size = learner.config.training.global_batch_size
    shapes = {
        "image": ((size, *learner.image_shape), jnp.uint8),
        "label": ((size,), jnp.int32),
    }
    cut = parallel.batch_sharding(learner.mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=cut)
        for name, (shape, dtype) in shapes.items()
    }


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
      image_size: side of the images; by default the net's own.
      dtype: of the convolutions.
      steps: timed steps; each is timed until it finishes.
      json_path: where to write the result, if anywhere.
      console: where to print; standard output by default.

    Returns:
      images_per_second and milliseconds (medians), compile_seconds, peak memory and
      multiply-adds per second (three times the forward pass, by convention).

    Raises:
      UserError: an unknown net, or a batch that does not divide over the devices.
    """
    if batch_size < 1 or steps < 1 or (image_size is not None and image_size < 1):
        raise UserError("--batch, --steps and --image-size must be at least 1")
    learner = synthetic_learner(model, batch_size, image_size=image_size, dtype=dtype)
    state, batch = synthetic_inputs(learner)
    start = time.perf_counter()
    compiled = make_train_step(learner).lower(state, None, batch).compile()
    compile_seconds = time.perf_counter() - start
    milliseconds = []
    for _ in range(2 + steps):
        jax.block_until_ready(state)
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(state, None, batch))
        milliseconds.append(1000 * (time.perf_counter() - start))
    times = milliseconds[2:]
    per_second = 1000 * batch_size / statistics.median(times)
    forward = count_multiply_adds(learner.model, learner.image_shape)
    result = {
        "model": model,
        "batch_size": batch_size,
        "image_size": learner.image_shape[0],
        "dtype": dtype,
        "images_per_second": per_second,
        **_spread("milliseconds", times),
        "steps": steps,
        "compile_seconds": compile_seconds,
        **_peak_memory(),
        "multiply_adds_per_second": 3 * forward * per_second,
    }
    return _report(result, console, json_path)


def benchmark_inference(
    net: str | TrainedNet,
    *,
    batch_sizes: Sequence[int] = (1, 8, 32),
    dtype: str | None = None,
    steps: int = 50,
    json_path: str | None = None,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Times a net on random uint8 images on the default device, normalisation included.

    Batch normalisation is folded into the convolutions where that is possible.

    Args:
      net: from ``load_net``, or a name of the catalog for random weights.
      batch_sizes: images per call; each is compiled and measured by itself.
      dtype: of the convolutions; None keeps the net's own.
      steps: timed calls for each batch size; each is timed until its logits are there.
      json_path: where to write the result, if anywhere.
      console: where to print; standard output by default.

    Returns:
      Under "batches", for each size: images_per_second (of the median call), the
      percentiles milliseconds_p50, _p90 and _p99, and compile_seconds.

    Raises:
      UserError: an unknown net, or a count below 1.
    """
    if not batch_sizes or min(*batch_sizes, steps) < 1:
        raise UserError("--batch and --steps must be at least 1")
    name, given, variables, statistics, shape = _net_to_time(net)
    given = given if dtype is None else given.clone(dtype=jnp.dtype(dtype))
    model, variables = folded(given, variables)

    @jax.jit
    def classify(variables: Any, images: jax.Array) -> jax.Array:
        images = normalize(to_unit(images), statistics)
        return model.apply(variables, images, train=False)

    rows = [_time_calls(classify, variables, (n, *shape), steps) for n in batch_sizes]
    result = {
        "model": name,
        "image_size": shape[0],
        "dtype": str(jnp.dtype(getattr(model, "dtype", jnp.float32))),
        "folded": model is not given,
        "steps": steps,
        **_peak_memory(),
    }
    shown = {f"batch {row['batch_size']}": _describe_row(row) for row in rows}
    return _report(result | {"batches": rows}, console, json_path, result | shown)


def _net_to_time(net: str | TrainedNet) -> tuple[Any, ...]:
    """Name, model, variables, pixel statistics, and the images' (h, w, c)."""
    if isinstance(net, TrainedNet):
        shape = image_shape(net)
        return net.name, net.model, net.variables, net.statistics, shape
    entry, model = catalog_entry(net), create_model(net)
    shape = (entry.image_size, entry.image_size, entry.channels)
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, *shape)), train=False))
    statistics = PixelStatistics(*np.full((2, 1, 1, entry.channels), 0.5, np.float32))
    return net, model, init(jax.random.key(0)), statistics, shape


def _time_calls(
    classify: Any, variables: Any, shape: tuple[int, ...], steps: int
) -> dict[str, float]:
    """The row of one batch size."""
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = jax.device_put(images)
    start = time.perf_counter()
    compiled = classify.lower(variables, images).compile()
    compile_seconds = time.perf_counter() - start
    milliseconds = []
    for _ in range(3 + steps):
        start = time.perf_counter()
        jax.block_until_ready(compiled(variables, images))
        milliseconds.append(1000 * (time.perf_counter() - start))
    p50, p90, p99 = np.percentile(milliseconds[3:], (50, 90, 99)).tolist()
    return {
        "batch_size": shape[0],
        "images_per_second": 1000 * shape[0] / p50,
        "milliseconds_p50": p50,
        "milliseconds_p90": p90,
        "milliseconds_p99": p99,
        "compile_seconds": compile_seconds,
    }


def _describe_row(row: dict[str, float]) -> str:
    latency = ", ".join(
        f"p{p} {describe(row[f'milliseconds_p{p}'])} ms" for p in (50, 90, 99)
    )
    return (
        f"{describe(row['images_per_second'])} images/s; {latency}; "
        f"compiled in {describe(row['compile_seconds'])} s"
    )


def benchmark_input(
    config: Config,
    *,
    batches: int = 50,
    rounds: int = 5,
    json_path: str | None = None,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Times the training batches of a config up to the device, without any step.

    Args:
      config: of a run; its data, augmentation and batch size are used.
      batches: per round.
      rounds: the median is over these; one more comes first and fills the pipeline.
      json_path: where to write the result, if anywhere.
      console: where to print; standard output by default.

    Returns:
      images_per_second and images_per_cpu_second (this process), medians; seconds until
      the first batch; peak memory.

    Raises:
      UserError: the data are missing or broken, or a count is below 1.
    """
    if batches < 1 or rounds < 1:
        raise UserError("--batches and --rounds must be at least 1")
    mesh, size = parallel.data_mesh(), config.training.global_batch_size
    parallel.check_divides(size, mesh.size)
    start = time.perf_counter()
    source = open_collection(config.data).source(config.data.train_split)
    split = Split("train", source, config.data)
    feed = make_feed(split, mesh, config.data, config.augmentation)
    with contextlib.closing(feed.training_batches(0, size, config.seed)) as stream:
        jax.block_until_ready(next(stream))
        first = time.perf_counter() - start
        speeds, busy = [], []
        for _ in range(1 + rounds):
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(batches):
                jax.block_until_ready(next(stream))
            speeds.append(batches * size / (time.perf_counter() - began))
            busy.append(batches * size / (time.process_time() - cpu))
    data = config.data
    result = {
        "data": data.name,
        "examples": len(split),
        "image_shape": list(split.training_shape),
        "resident": feed.resident is not None,
        "batch_size": size,
        "threads": data.threads,
        "processes": data.num_processes,
        **_spread("images_per_second", speeds[1:]),
        # Worker processes are only counted when they end, after the last round.
        "images_per_cpu_second": (
            None if data.num_processes else statistics.median(busy[1:])
        ),
        "first_batch_seconds": first,
        "peak_mib": _process_peak_bytes() / 2**20,
        "batches_a_round": batches,
        "rounds": rounds,
    }
    return _report(result, console, json_path)


def _spread(name: str, values: list[float]) -> dict[str, float]:
    middle = statistics.median(values)
    return {name: middle, f"{name}_min": min(values), f"{name}_max": max(values)}


def _report(
    result: dict[str, Any],
    console: rich.console.Console | None,
    json_path: str | None,
    shown: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Prints a measurement, adds the environment to it and writes its JSON file.

    ``shown`` is printed in place of the result if given.
    """
    facts = result if shown is None else shown
    result = result | {"environment": environment()}
    where = {name: result["environment"][name] for name in ("devices", "cpu_cores")}
    facts = facts | where
    print_facts(
        console or make_console(),
        {
            name.replace("_", " "): describe(value)
            for name, value in facts.items()
            if value is not None
        },
    )
    if json_path is not None and distributed.is_primary():
        write_text(json_path, json.dumps(result, indent=2) + "\n")
    return result


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
    """Peak bytes on the first device, or of the process if the device gives none."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak is None:
        return {"peak_bytes": _process_peak_bytes(), "peak_of": "process"}
    return {"peak_bytes": peak, "peak_of": "device"}


def _process_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
