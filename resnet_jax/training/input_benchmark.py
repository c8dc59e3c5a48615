"""Measures the input pipeline of a config; see ``benchmark_input``."""

import contextlib
import resource
import statistics
import sys
import time
from typing import Any

import jax
import rich.console

from resnet_jax import distributed, parallel
from resnet_jax.config import Config
from resnet_jax.data.feeds import make_feed
from resnet_jax.data.sources import open_collection
from resnet_jax.data.split import Split
from resnet_jax.errors import UserError
from resnet_jax.training.benchmark import write_json
from resnet_jax.training.environment import environment
from resnet_jax.training.progress import say


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
      config: of a run; its data, augmentation and batch size.
      batches: a round.
      rounds: the median is over these; one more comes before, to fill the pipeline.
      json_path: where to write the result, if anywhere.
      console: where to print; standard output by default.

    Returns:
      images_per_second and images_per_cpu_second (of the process and its own worker
      processes), medians; seconds until the first batch; peak memory.

    Raises:
      UserError: the data are missing or broken, or a count is below 1.
    """
    if batches < 1 or rounds < 1:
        raise UserError("--batches and --rounds must be at least 1")
    console = console or rich.console.Console(quiet=not distributed.is_primary())
    mesh = parallel.data_mesh()
    size = config.training.global_batch_size
    parallel.check_divides(size, mesh.size)
    start = time.perf_counter()
    source = open_collection(config.data).source(config.data.train_split)
    split = Split("train", source, config.data)
    feed = make_feed(split, mesh, config.data, config.augmentation)
    with contextlib.closing(feed.training_batches(0, size, config.seed)) as stream:
        jax.block_until_ready(next(stream))
        first = time.perf_counter() - start
        speeds, busy = [], []
        for number in range(rounds + 1):
            began, cpu = time.perf_counter(), _cpu_seconds()
            for _ in range(batches):
                jax.block_until_ready(next(stream))
            if number:
                speeds.append(batches * size / (time.perf_counter() - began))
                busy.append(batches * size / max(_cpu_seconds() - cpu, 1e-9))
    result = {
        "data": config.data.name,
        "examples": len(split),
        "image_shape": list(split.training_shape),
        "resident": feed.resident is not None,
        "batch_size": size,
        "threads": config.data.threads,
        "processes": config.data.num_processes,
        "images_per_second": statistics.median(speeds),
        "images_per_second_min": min(speeds),
        "images_per_second_max": max(speeds),
        # Worker processes are counted when they end: not until the last round.
        "images_per_cpu_second": (
            None if config.data.num_processes else statistics.median(busy)
        ),
        "first_batch_seconds": first,
        "peak_mib": _peak_mib(),
        "batches_a_round": batches,
        "rounds": rounds,
        "environment": environment(),
    }
    _print(console, result)
    if json_path is not None and distributed.is_primary():
        write_json(json_path, result)
    return result


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak_mib() -> float:
    """The most memory that this process had; that of its workers beside it."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _print(console: rich.console.Console, result: dict[str, Any]) -> None:
    shape = "x".join(map(str, result["image_shape"]))
    kind = "resident on the device" if result["resident"] else "streamed"
    say(
        console,
        f"{result['data']}: {result['examples']:,} examples, {shape}, {kind}; "
        f"batch {result['batch_size']}, {result['threads']} threads, "
        f"{result['processes']} processes, {result['environment']['cpu_cores']} cores",
    )
    lines = {
        "images a second": f"{result['images_per_second']:,.0f} (median of "
        f"{result['rounds']}; {result['images_per_second_min']:,.0f} to "
        f"{result['images_per_second_max']:,.0f})",
        "first batch after": f"{result['first_batch_seconds']:.2f} s",
        "peak memory": f"{result['peak_mib']:,.0f} MiB",
    }
    if result["images_per_cpu_second"] is not None:
        lines["images a CPU second"] = f"{result['images_per_cpu_second']:,.0f}"
    for name, value in lines.items():
        say(console, f"  {name:<24}{value}")
