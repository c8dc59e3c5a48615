"""Plans a training run: steps, memory, work and input rate, without devices or data.

``plan`` computes them by arithmetic. With a target, it also compiles the training step
for that chip and reports the compiler's figures; see ``targets.compile``.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from jax.sharding import AbstractMesh

from resnet_jax.analysis.complexity import count_multiply_adds, count_parameters
from resnet_jax.config import Config, Derived, resolve
from resnet_jax.console import describe_seconds, say
from resnet_jax.data.dataset import Dataset
from resnet_jax.data.feeds import is_resident
from resnet_jax.data.on_paper import paper_dataset
from resnet_jax.errors import UserError
from resnet_jax.targets.chips import CHIPS, Chip, find_chips
from resnet_jax.targets.compile import Compiled, compile_step, target_mesh
from resnet_jax.training.schedule import Schedule
from resnet_jax.training.state import Learner, make_learner

IMAGES_PER_CORE = 633.0
"""Images per second that one core reads, decodes and crops: Inception crops of JPEG
files of 106 KB on average, one core of a shared Intel Xeon, 2026-11-21
(benchmarks/results/input_pipeline.json)."""

STEP_PER_FORWARD = 3
"""Work of a training step relative to its forward pass: the backward pass has two
products for each of the forward pass."""


_MOST_DEVICES, _MOST_RATE = 10**6, 10**15


@dataclasses.dataclass(frozen=True)
class Rate:
    """The learning rate at a step, counted from 1, and why it is listed."""

    when: str
    step: int
    rate: float


@dataclasses.dataclass(frozen=True)
class ChipBound:
    """The roofline by FLOPs of one kind of chip: a bound, not a measurement.

    Attributes:
      name: name of the chip.
      step_seconds: least time per step: its FLOPs over the peak of all devices.
      images_per_second: highest rate of all devices.
      run_seconds: all steps, without evaluation and checkpoints.
      host_cores: cores per host to load images at that rate; None if nothing streams.
    """

    name: str
    step_seconds: float
    images_per_second: float
    run_seconds: float
    host_cores: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on paper; see ``plan``.

    Attributes:
      model, dataset, dtype: from the config.
      devices, hosts: number of each.
      streamed: whether hosts load training images during the run; otherwise the devices
        hold them all.
      training_examples, steps, epochs: length of the run.
      global_batch_size, images_per_device, images_per_host: images per step.
      learning_rates: where the schedule changes.
      parameters: number of trainable parameters.
      memory: bytes per device by part, without activations and scratch memory.
      forward_multiply_adds: per image.
      step_flops: per step on all devices, 2 * 3 * forward_multiply_adds * batch.
      images_per_core: images per second that one core loads.
      rate: images per second of all devices, if given.
      host_images_per_second, host_cores: what that rate needs per host.
      chips: a bound per chip.
      compiled: the compiler's figures, if a target was given.
      notes: sentences on surprises.
    """

    model: str
    dataset: str
    dtype: str
    devices: int
    hosts: int
    streamed: bool
    training_examples: int
    steps: int
    epochs: float
    global_batch_size: int
    images_per_device: int
    images_per_host: int
    learning_rates: tuple[Rate, ...]
    parameters: int
    memory: dict[str, int]
    forward_multiply_adds: int
    step_flops: int
    images_per_core: float
    rate: float | None
    host_images_per_second: float | None
    host_cores: float | None
    chips: tuple[ChipBound, ...]
    compiled: Compiled | None
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """All figures, as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def plan(
    config: Any,
    *,
    devices: int | None = None,
    hosts: int | None = None,
    chips: Sequence[str] = (),
    rate: float | None = None,
    images_per_core: float = IMAGES_PER_CORE,
    examples: int | None = None,
    classes: int | None = None,
    image_size: int | None = None,
    target: str | None = None,
    console: rich.console.Console | None = None,
) -> Plan:
    """Plans a training run; needs neither an accelerator nor the data.

    Args:
      config: made by a config file's ``get_config``, or a Config.
      devices: devices that share the batch; by default those of a TPU target, else 1.
      hosts: hosts of the devices; by default those of a TPU target, else 1.
      chips: names of ``CHIPS``; by default all.
      rate: images per second of all devices, to compute the input that it needs.
      images_per_core: images per second that one core loads.
      examples: training examples, if the data set is neither known nor present.
      classes: classes of such a data set.
      image_size: side of its images in pixels.
      target: chip to compile the training step for; see ``compile_step``.
      console: shows a running clock while compiling.

    Raises:
      UserError: the config is wrong, numbers do not divide, or the target cannot be
        compiled for.
    """
    config = resolve(config)
    if target is not None:
        slice_ = target_mesh(target, devices)
        devices = slice_.size
        processes = {device.process_index for device in slice_.devices.flat}
        hosts = len(processes) if hosts is None else hosts
    devices = 1 if devices is None else devices
    hosts = 1 if hosts is None else hosts
    _check(devices, hosts, rate, images_per_core)
    chosen = find_chips(chips)
    dataset = paper_dataset(config, examples, classes, image_size)
    mesh: Any = AbstractMesh((devices,), ("data",))
    learner = make_learner(
        config,
        mesh,
        num_examples=len(dataset.train),
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
    )
    derived, batch = learner.derived, config.training.global_batch_size
    forward = count_multiply_adds(learner.model, dataset.image_shape)
    flops = 2 * STEP_PER_FORWARD * forward * batch
    streamed = not is_resident(dataset.train, config.data, config.augmentation)

    def bound(chip: Chip) -> ChipBound:
        seconds = flops / devices / chip.peak(config.model.dtype)
        cores = batch / seconds / hosts / images_per_core if streamed else None
        run_seconds = seconds * derived.steps
        return ChipBound(chip.name, seconds, batch / seconds, run_seconds, cores)

    compiled = None
    if target is not None:
        compiled = compile_step(config, dataset, target, devices, console)
    return Plan(
        model=config.model.name,
        dataset=config.data.name,
        dtype=config.model.dtype,
        devices=devices,
        hosts=hosts,
        streamed=streamed,
        training_examples=len(dataset.train),
        steps=derived.steps,
        epochs=derived.epochs,
        global_batch_size=batch,
        images_per_device=batch // devices,
        images_per_host=batch // hosts,
        learning_rates=learning_rates(config, derived),
        parameters=count_parameters(learner.abstract_state().params),
        memory=plan_memory(learner, dataset),
        forward_multiply_adds=forward,
        step_flops=flops,
        images_per_core=images_per_core,
        rate=rate,
        host_images_per_second=rate and rate / hosts,
        host_cores=rate and rate / hosts / images_per_core,
        chips=tuple(bound(chip) for chip in chosen),
        compiled=compiled,
        notes=_notes(config, derived),
    )


def learning_rates(config: Config, derived: Derived) -> tuple[Rate, ...]:
    """The learning rate where the schedule changes.

    A warm-up until a training error counts as one step, and drops at plateaus are left
    out: both depend on the run.
    """
    schedule = Schedule(config.optimizer, config.schedule, derived)
    points = {0: "first step", derived.steps - 1: "last step"}
    if 0 < derived.warmup_steps < derived.steps:
        points[derived.warmup_steps - 1] = "end of the warm-up"
    drops = [step for step in derived.boundaries if step < derived.steps]
    points |= dict.fromkeys(drops, "after a drop")
    first = schedule.init()
    later = dataclasses.replace(first, warming=jnp.array(False))
    return tuple(
        Rate(
            points[done],
            done + 1,
            float(schedule.rate(later if done else first, jnp.asarray(done))),
        )
        for done in sorted(points)
    )


def plan_memory(learner: Learner, dataset: Dataset) -> dict[str, int]:
    """Bytes on each device of a run, by part.

    Streamed batches count twice: the step's and the next. Activations and scratch
    memory are not included.
    """
    config, state = learner.config, learner.abstract_state()
    leaves = jax.tree.map(_part_bytes, state)
    names = {
        "parameters": "params",
        "batch statistics": "batch_stats",
        "optimizer": "opt_state",
        "moving averages": "ema",
    }
    parts = {title: _sum(getattr(leaves, name)) for title, name in names.items()}
    parts["rest of the state"] = _sum(leaves) - sum(parts.values())
    parts["gradients"] = 4 * count_parameters(state.params)
    resident = [
        split
        for split in (dataset.train, dataset.holdout, dataset.test)
        if split and is_resident(split, config.data, config.augmentation)
    ]
    parts["resident data"] = sum(split.nbytes + 4 * len(split) for split in resident)
    images = config.training.global_batch_size // learner.mesh.size
    streamed = 2 * images * (math.prod(dataset.image_shape) + 4)
    parts["batches"] = 4 * images if dataset.train in resident else streamed
    return parts | {"total": sum(parts.values())}


def _part_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _sum(tree: Any) -> int:
    return sum(jax.tree.leaves(tree))


def _notes(config: Config, derived: Derived) -> tuple[str, ...]:
    notes = derived.notes()
    if config.schedule.warmup_until_error is not None:
        notes.append(
            "note: the learning rate rises to "
            f"{config.optimizer.learning_rate:g} once the training error is below "
            f"{config.schedule.warmup_until_error:g}"
        )
    if config.schedule.kind == "plateau":
        notes.append(
            "note: the plan leaves out drops at plateaus of the held-out error"
        )
    return tuple(notes)


def _check(
    devices: int, hosts: int, rate: float | None, images_per_core: float
) -> None:
    for name, count in (("devices", devices), ("hosts", hosts)):
        if not 1 <= count <= _MOST_DEVICES:
            raise UserError(f"--{name} must be from 1 to {_MOST_DEVICES:,}")
    if devices % hosts:
        lower = devices // hosts * hosts
        choices = " or ".join(str(n) for n in (lower, lower + hosts) if n)
        raise UserError(
            f"{devices} devices do not divide over {hosts} hosts: give --devices "
            f"{choices}, or other --hosts"
        )
    for name, value in (("rate", rate), ("images-per-core", images_per_core)):
        if value is not None and not 0 < value <= _MOST_RATE:
            raise UserError(f"--{name} must be above 0 and up to {_MOST_RATE:,}")


# Printing


def print_plan(console: rich.console.Console, run: Plan) -> None:
    """Prints a plan within 80 columns."""
    devices, hosts = _count(run.devices, "device"), _count(run.hosts, "host")
    say(console, f"{run.model}, {run.dtype}, {run.dataset}; {devices} on {hosts}")
    _print_rows(console, "run", _run_rows(run))
    rates = {
        f"step {rate.step:,}": f"{rate.rate:<10.4g} {rate.when}"
        for rate in run.learning_rates
    }
    _print_rows(console, "learning rate", rates)
    memory = {name: _bytes(nbytes) for name, nbytes in run.memory.items() if nbytes}
    _print_rows(console, "memory per device, without activations", memory)
    if run.rate is not None:
        input_rows = {
            "images/s": f"{run.rate:,.0f}; {run.host_images_per_second:,.0f} per host",
            "cores per host": f"{run.host_cores:,.1f}, at {run.images_per_core:,.0f} "
            "images/s per core",
        }
        _print_rows(console, "input at the given rate", input_rows)
    _print_chips(console, run)
    if run.compiled is not None:
        _print_rows(console, "compiled step, per device", _compiled_rows(run.compiled))
    for note in run.notes:
        say(console, note)


def _run_rows(run: Plan) -> dict[str, str]:
    return {
        "steps": f"{run.steps:,} of {run.global_batch_size:,} images",
        "epochs": f"{run.epochs:.4g} of {run.training_examples:,} examples",
        "per device": f"{run.images_per_device:,} images per step",
        "per host": f"{run.images_per_host:,} images per step",
        "parameters": f"{run.parameters:,}",
        "forward pass": f"{run.forward_multiply_adds / 1e9:.4g} G multiply-adds per "
        "image",
        "training step": f"{run.step_flops / 1e12:.4g} TFLOP, {STEP_PER_FORWARD} times "
        "the forward pass",
    }


def _print_chips(console: rich.console.Console, run: Plan) -> None:
    say(console, "\nroofline by FLOPs: bounds at the published peaks, not measured")
    table = rich.table.Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("chip", "ms/step", "images/s", "run", "cores/host"):
        justify: Any = "left" if heading == "chip" else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for chip in run.chips:
        table.add_row(
            chip.name,
            f"{1e3 * chip.step_seconds:,.2f}",
            f"{chip.images_per_second:,.0f}",
            describe_seconds(chip.run_seconds),
            "-" if chip.host_cores is None else f"{chip.host_cores:,.1f}",
        )
    console.print(table, highlight=False)


def _compiled_rows(step: Compiled) -> dict[str, str]:
    rows = {
        "target": f"{step.devices} x {step.device_kind}, jax {step.jax_version}",
        "arguments": f"{_bytes(step.argument_bytes)}, state and data",
        "outputs": f"{_bytes(step.output_bytes)}, {_bytes(step.alias_bytes)} in place",
        "temporaries": _bytes(step.temporary_bytes),
        "code": _bytes(step.code_bytes) if step.code_bytes else "not reported",
        "peak": _bytes(step.peak_bytes),
        "FLOPs": f"{step.flops / 1e12:.4g} TFLOP" if step.flops else "not reported",
        "bytes accessed": _bytes(step.bytes_accessed or 0) or "not reported",
    }
    if step.chip in CHIPS:
        chip = CHIPS[step.chip]
        share = step.peak_bytes / chip.memory_gb / 1e9
        rows["peak"] += f", {share:.0%} of {chip.memory_gb:g} GB"
        if step.bytes_accessed:
            seconds = step.bytes_accessed / chip.memory_gb_per_second / 1e9
            rows["bytes accessed"] += f", at least {1e3 * seconds:,.2f} ms"
    for kind in step.collectives:
        rows[kind.name] = f"{kind.count}, {_bytes(kind.nbytes)} in all"
    return rows | {"compile time": describe_seconds(step.seconds)}


def _print_rows(
    console: rich.console.Console, title: str, rows: dict[str, str]
) -> None:
    say(console, f"\n{title}")
    for name, value in rows.items():
        say(console, f"  {name:<20}{value}")


def _bytes(nbytes: float) -> str:
    """In decimal units, as in data sheets; empty for 0 bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:,.2f} {unit}"
    return f"{nbytes:.0f} bytes" if nbytes else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
