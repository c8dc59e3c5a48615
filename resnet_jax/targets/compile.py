"""Compiles a training step for a chip that this machine need not have."""

import contextlib
import dataclasses
import importlib.util
import math
import re
import time
from collections.abc import Iterator
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
from jax.experimental import topologies
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.config import Config
from resnet_jax.console import say
from resnet_jax.data.dataset import Dataset
from resnet_jax.data.feeds import is_resident
from resnet_jax.errors import UserError
from resnet_jax.models.platforms import compiling_for
from resnet_jax.training.step import make_train_step
from resnet_jax.training.train import learner_for

GPUS = ("h100", "h200")
VALID = "cpu, h100, h200 and TPU slices such as tpu:v5e:4x4, tpu:v6e:2x4, tpu:v5p:2x2x1"

_COLLECTIVE = re.compile(
    r" = (?P<shape>\S.*?) (?P<name>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"ragged-all-to-all|collective-permute|collective-broadcast)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices.

    Attributes:
      name: HLO's name, such as "all-reduce".
      count: instructions in the program. One inside a loop counts once.
      nbytes: size of their results on one device.
    """

    name: str
    count: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's figures for one training step, on one device.

    Attributes:
      target: as given to ``compile_step``.
      device_kind: the compiler's name for the chip.
      devices: devices of the program.
      argument_bytes: state and batch.
      output_bytes: the next state.
      alias_bytes: outputs that reuse the memory of donated arguments.
      temporary_bytes: activations, gradients and scratch memory.
      code_bytes: the program; 0 if not reported.
      peak_bytes: arguments, outputs without aliases, temporaries and code.
      flops: floating-point operations; None if not reported.
      bytes_accessed: memory traffic; None if not reported.
      collectives: exchanges between devices.
      chip: the target's name in ``CHIPS``, or None.
      seconds: to lower and compile.
      jax_version: the version that compiled it.
    """

    target: str
    device_kind: str
    devices: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    code_bytes: int
    peak_bytes: int
    flops: float | None
    bytes_accessed: float | None
    collectives: tuple[Collective, ...]
    chip: str | None
    seconds: float
    jax_version: str


def compile_step(
    config: Config,
    dataset: Dataset,
    target: str,
    devices: int | None = None,
    console: rich.console.Console | None = None,
) -> Compiled:
    """Compiles the training step of a config ahead of time.

    Args:
      config: config of the run.
      dataset: only its sizes and shapes are read.
      target: "cpu", "h100", "h200", or "tpu:" and a topology such as "v5e:4x4".
      devices: number of CPU devices or GPUs; a TPU slice fixes its own.
      console: shows a running clock.

    Raises:
      UserError: an unknown target, a missing wheel, a batch that does not divide over
        the devices, or a program that the compiler refuses.
    """
    mesh = target_mesh(target, devices)
    console = console or rich.console.Console(quiet=True)
    start = time.perf_counter()
    with _clock(console, f"compiling for {mesh.size} x {_kind(mesh)}"):
        compiled = _compile(_lower_step(config, dataset, mesh))
    return _read(compiled, target, mesh, time.perf_counter() - start)


def target_mesh(target: str, devices: int | None = None) -> Mesh:
    """The device mesh of a target, with the axis of ``parallel.data_mesh``.

    Raises:
      UserError: an unknown target, too many devices, or a missing wheel.
    """
    if target == "cpu":
        found = jax.devices("cpu")[: devices or 1]
        if devices and len(found) < devices:
            raise UserError(
                f"{devices} CPU devices are more than the {len(found)} here: set "
                f"JAX_NUM_CPU_DEVICES={devices}"
            )
    elif target in GPUS:
        found = _gpus(target, devices or 1)
    elif re.fullmatch(r"tpu:\w+:\d+(x\d+)+", target):
        found = _tpus(target)
        if devices not in (None, len(found)):
            raise UserError(f"{target} has {len(found)} devices, not {devices}")
    else:
        raise UserError(f"unknown target {target!r}; valid are {VALID}")
    found = sorted(found, key=lambda device: (device.process_index, device.id))
    axes = parallel.data_mesh(1)
    return Mesh(np.array(found), axes.axis_names, axis_types=axes.axis_types)


def _gpus(target: str, count: int) -> list[Any]:
    plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    with contextlib.suppress(ModuleNotFoundError):
        if any(importlib.util.find_spec(plugin) for plugin in plugins):
            description = (resources.files(__package__) / f"{target}.txtpb").read_text()
            options = {"target_config": description, "topology": f"1x1x{count}"}
            return _topology(target, target, "cuda", **options)
    version = jax.__version__
    raise UserError(
        f"compiling for {target} needs two wheels: pip install --no-deps "
        f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
    )


def _tpus(target: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"compiling for {target} needs a wheel: pip install libtpu")
    name = target.removeprefix("tpu:")
    # JAX sees the two cores of these chips as one device.
    paired = name.startswith(("v4:", "v5p:"))
    options = {"chip_config_name": "megacore"} if paired else {}
    return _topology(target, name, "tpu", **options)


def _topology(target: str, name: str, platform: str, **options: Any) -> list[Any]:
    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except NotImplementedError as error:
        raise UserError(
            f"jax cannot describe {target} in this process: set JAX_PLATFORMS=cpu"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split("\n")[0].split(";")[0]
        raise UserError(
            f"unknown target {target!r} ({reason}); valid are {VALID}"
        ) from error


def _lower_step(config: Config, dataset: Dataset, mesh: Mesh) -> jax.stages.Lowered:
    """The training step of a run on a mesh, lowered for the mesh's platform."""
    learner = learner_for(config, dataset, mesh)
    inputs = _abstract_batch(config, dataset, mesh)
    return lower(make_train_step(learner), mesh, learner.abstract_state(), *inputs)


def lower(
    function: jax.stages.Wrapped, mesh: Mesh, *arguments: Any
) -> jax.stages.Lowered:
    """A jitted function of abstract arguments, lowered for the devices of a mesh."""
    platform = mesh.devices.flat[0].platform
    with compiling_for(platform):
        traced = function.trace(*arguments)
    lowering = {"gpu": "cuda"}.get(platform, platform)
    return traced.lower(lowering_platforms=(lowering,))


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    # A program from the persistent cache has lost some of its statistics.
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"the compiler refuses the step: {reason}") from error
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def _abstract_batch(config: Config, dataset: Dataset, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes of the resident data set, or None, and of the step's batch."""
    train, count = dataset.train, config.training.global_batch_size

    def array(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    same, cut = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    if is_resident(train, config.data, config.augmentation):
        resident = {
            "image": array((len(train), *train.image_shape), jnp.uint8, same),
            "label": array((len(train),), jnp.int32, same),
        }
        return resident, {"index": array((count,), jnp.int32, cut)}
    return None, {
        "image": array((count, *train.training_shape), jnp.uint8, cut),
        "label": array((count,), jnp.int32, cut),
    }


def _read(
    compiled: jax.stages.Compiled, target: str, mesh: Mesh, seconds: float
) -> Compiled:
    memory: Any = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    alias, temporary = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    code = memory.generated_code_size_in_bytes
    return Compiled(
        target=target,
        device_kind=_kind(mesh),
        devices=mesh.size,
        argument_bytes=arguments,
        output_bytes=outputs,
        alias_bytes=alias,
        temporary_bytes=temporary,
        code_bytes=code,
        peak_bytes=arguments + outputs - alias + temporary + code,
        flops=cost.get("flops") or None,
        bytes_accessed=cost.get("bytes accessed") or None,
        collectives=read_collectives(compiled.as_text() or ""),
        chip=_chip(target),
        seconds=seconds,
        jax_version=jax.__version__,
    )


def read_collectives(text: str) -> tuple[Collective, ...]:
    """The collectives in the text of an optimised HLO module."""
    found: dict[str, list[int]] = {}
    for match in _COLLECTIVE.finditer(text):
        sizes = [_nbytes(*array) for array in _ARRAY.findall(match["shape"])]
        # The start of any other collective returns its operands too.
        whole = match["start"] is None or match["name"] == "all-reduce"
        found.setdefault(match["name"], []).append(sum(sizes) if whole else max(sizes))
    return tuple(
        Collective(name, len(sizes), sum(sizes)) for name, sizes in found.items()
    )


def _nbytes(dtype: str, bits: str, shape: str) -> int:
    elements = math.prod(int(size) for size in shape.split(",") if size)
    return elements * (8 if dtype == "pred" else int(bits)) // 8


def _chip(target: str) -> str | None:
    if target in GPUS:
        return f"{target}_sxm"
    family = target.removeprefix("tpu:").partition(":")[0]
    return f"tpu_{family}" if target.startswith("tpu:") else None


def _kind(mesh: Mesh) -> str:
    return str(mesh.devices.flat[0].device_kind)


@contextlib.contextmanager
def _clock(console: rich.console.Console, text: str) -> Iterator[None]:
    """Shows the seconds that the body takes; without a terminal only the text."""
    if not console.is_terminal:
        say(console, text)
    with rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        progress.add_task(text, total=None)
        yield
