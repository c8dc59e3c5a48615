"""A training run on paper; see ``plan``."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.analysis.complexity import count_multiply_adds
from resnet_jax.config import Config, Derived, derive, resolve
from resnet_jax.errors import UserError
from resnet_jax.planning.chips import Chip, find_chips
from resnet_jax.planning.datasets import paper_dataset
from resnet_jax.planning.steps import (
    TracedStep,
    resident_bytes,
    trace_step,
    tree_bytes,
)
from resnet_jax.training.schedule import Schedule

IMAGES_PER_CORE = 633.0
"""Images a second that one core reads, decodes and crops: measured on one core of a
shared Intel Xeon, 2026-11-21, Inception's crops of JPEG files of 106 KB on average
(benchmarks/results/input_pipeline.json)."""

BATCHES_AHEAD = 2
"""Streamed batches on a device: the step's and the next one."""


@dataclasses.dataclass(frozen=True)
class Rate:
    """The learning rate of a step, counted from 1, and what happens there."""

    when: str
    step: int
    rate: float


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
      parameters, batch_statistics, optimizer, ema: of the state.
      other_state: the rest of it.
      gradients: those alive at the peak of the step.
      activations: all else that the step has in memory then.
      resident_data: splits that lie on the device whole.
      input_batches: the step's batch and the next one.
    """

    parameters: int
    batch_statistics: int
    optimizer: int
    ema: int
    other_state: int
    gradients: int
    activations: int
    resident_data: int
    input_batches: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.asdict(self).values())


@dataclasses.dataclass(frozen=True)
class ChipPlan:
    """A run on one kind of chip: bounds from published peaks, nothing measured.

    Attributes:
      name: of the chip.
      fits: whether the memory of one device suffices.
      memory_share: what is taken of it.
      compute_seconds: multiply-adds of a step over the peak, times the efficiency.
      traffic_seconds: bytes of a step over the bandwidth, times the efficiency.
      all_reduce_seconds: of the gradients, in a ring.
      step_seconds: the longest of the three: all overlap at best.
      images_per_second: of all devices.
      run_seconds: of all steps, without evaluation and checkpoints.
      host_images_per_second: what a host has to read and decode to keep that pace.
      host_cores: how many cores that takes, at ``images_per_core``.
      host_bytes_per_second: of stored images, where their mean size is given.
    """

    name: str
    fits: bool
    memory_share: float
    compute_seconds: float
    traffic_seconds: float
    all_reduce_seconds: float
    step_seconds: float
    images_per_second: float
    run_seconds: float
    host_images_per_second: float
    host_cores: float
    host_bytes_per_second: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will take; see ``plan``.

    Attributes:
      model, dataset, dtype: of the config.
      devices, hosts: of the plan.
      streamed: whether hosts read the training images while the steps run; else they
        lie on the devices.
      training_examples, steps, epochs: length of the run.
      global_batch_size, images_per_device, images_per_host: of a step.
      learning_rates: where the schedule turns.
      memory: of one device.
      forward_multiply_adds: of one image through the net.
      step_multiply_adds: of one image through the whole training step.
      step_bytes: that a device reads and writes in a step.
      gradient_bytes: that devices add up in a step.
      ring_bytes: of these, what each device sends.
      images_per_core, efficiency, mean_image_bytes: as assumed.
      chips: one after another.
      notes: sentences on what may surprise.
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
    memory: MemoryPlan
    forward_multiply_adds: int
    step_multiply_adds: int
    step_bytes: int
    gradient_bytes: int
    ring_bytes: float
    images_per_core: float
    efficiency: float
    mean_image_bytes: float | None
    chips: tuple[ChipPlan, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """All of it, as JSON."""
        content = dataclasses.asdict(self)
        content["memory"]["total"] = self.memory.total
        content["kind"] = "bounds from published peaks and a traced program"
        return json.dumps(content, indent=2) + "\n"


def plan(
    config: Any,
    *,
    devices: int = 1,
    hosts: int = 1,
    chips: Sequence[str] = (),
    efficiency: float = 1.0,
    images_per_core: float = IMAGES_PER_CORE,
    mean_image_bytes: float | None = None,
    interconnect: float | None = None,
    examples: int | None = None,
    classes: int | None = None,
    image_size: int | None = None,
) -> Plan:
    """Checks a training run on paper: steps, memory, time and input rate.

    The real training step is traced for one device's part of the batch, and its
    arrays, multiply-adds and bytes are counted. Neither an accelerator nor the data
    are needed. Times are bounds from the chips' published peaks, not measured.

    Args:
      config: made by a config file's ``get_config``, or a Config.
      devices: over which the batch is cut.
      hosts: over which the devices are spread.
      chips: names of ``chips.CHIPS``; all of them by default.
      efficiency: share of the peaks that is reached, in (0, 1]; 1 is the bound.
      images_per_core: that one core of a host reads a second.
      mean_image_bytes: of a stored image, for the bytes a host reads.
      interconnect: 10^9 bytes a second a device to others, both directions together,
        in place of the chips' own: for devices joined by a network.
      examples: of the training split, where the data set is neither known nor at hand.
      classes: of such a data set.
      image_size: side of its images.

    Raises:
      UserError: a fault in the config, or numbers that do not divide.
    """
    config = resolve(config)
    _check(devices, hosts, efficiency, images_per_core, mean_image_bytes, interconnect)
    chosen = find_chips(chips)
    dataset = paper_dataset(config, examples, classes, image_size)
    derived = derive(config, len(dataset.train))
    step = trace_step(config, dataset, devices)
    per_device = config.training.global_batch_size // devices
    on_paper = Plan(
        model=config.model.name,
        dataset=config.data.name,
        dtype=config.model.dtype,
        devices=devices,
        hosts=hosts,
        streamed=step.resident is None,
        training_examples=len(dataset.train),
        steps=derived.steps,
        epochs=derived.epochs,
        global_batch_size=config.training.global_batch_size,
        images_per_device=per_device,
        images_per_host=config.training.global_batch_size // hosts,
        learning_rates=learning_rates(config, derived),
        memory=plan_memory(step, resident_bytes(config, dataset)),
        forward_multiply_adds=count_multiply_adds(
            step.setup.model, dataset.image_shape
        ),
        step_multiply_adds=step.multiply_adds() // per_device,
        step_bytes=step.memory.traffic(),
        gradient_bytes=step.gradient_bytes(),
        ring_bytes=ring_bytes(step.gradient_bytes(), devices),
        images_per_core=images_per_core,
        efficiency=efficiency,
        mean_image_bytes=mean_image_bytes,
        chips=(),
        notes=_notes(config, derived, devices),
    )
    on_chips = tuple(_on_chip(on_paper, chip, interconnect) for chip in chosen)
    return dataclasses.replace(on_paper, chips=on_chips)


def learning_rates(config: Config, derived: Derived) -> tuple[Rate, ...]:
    """The schedule's rate where it turns.

    A warm-up by the training error is taken to end after the first step, and no
    plateau to come: both depend on the run.
    """
    schedule = Schedule(config.optimizer, config.schedule, derived)
    points = {0: "first step", derived.steps - 1: "last step"}
    if 0 < derived.warmup_steps < derived.steps:
        points[derived.warmup_steps - 1] = "end of the warm-up"
    for boundary in derived.boundaries:
        if boundary < derived.steps:
            points[boundary] = "after a drop"
    first = schedule.init()
    later = dataclasses.replace(first, warming=jnp.array(False))
    return tuple(
        Rate(
            when,
            done + 1,
            float(schedule.rate(later if done else first, jnp.asarray(done))),
        )
        for done, when in sorted(points.items())
    )


def plan_memory(step: TracedStep, resident: int) -> MemoryPlan:
    """The bytes on the device of a traced step, with so many of resident data."""
    state = step.held
    named = {
        "parameters": tree_bytes(state.params),
        "batch_statistics": tree_bytes(state.batch_stats),
        "optimizer": tree_bytes(state.opt_state),
        "ema": tree_bytes(state.ema),
    }
    peak = step.memory.peak()
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    gradients = sum(value.nbytes for value in peak.arrays if value.shape in shapes)
    ahead = BATCHES_AHEAD if step.resident is None else 1
    return MemoryPlan(
        **named,
        other_state=tree_bytes(state) - sum(named.values()),
        gradients=gradients,
        activations=peak.nbytes - gradients + step.gathered_bytes(),
        resident_data=resident,
        input_batches=ahead * tree_bytes(step.batch),
    )


def ring_bytes(nbytes: float, devices: int) -> float:
    """What each of n devices sends in a ring's all-reduce: 2 (n - 1) / n of it all."""
    return 2 * (devices - 1) / devices * nbytes


def _on_chip(run: Plan, chip: Chip, interconnect: float | None) -> ChipPlan:
    operations = 2 * run.step_multiply_adds * run.images_per_device
    compute = operations / chip.peak(run.dtype) / run.efficiency
    traffic = run.step_bytes / (1e9 * chip.memory_gb_per_second) / run.efficiency
    # Each device sends to its neighbour while it receives from the other one.
    one_way = 1e9 * (interconnect or chip.interconnect_gb_per_second) / 2
    all_reduce = run.ring_bytes / one_way
    seconds = max(compute, traffic, all_reduce)
    per_second = run.global_batch_size / seconds
    per_host = per_second / run.hosts
    share = run.memory.total / (1e9 * chip.memory_gb)
    mean = run.mean_image_bytes
    return ChipPlan(
        name=chip.name,
        fits=share <= 1,
        memory_share=share,
        compute_seconds=compute,
        traffic_seconds=traffic,
        all_reduce_seconds=all_reduce,
        step_seconds=seconds,
        images_per_second=per_second,
        run_seconds=seconds * run.steps,
        host_images_per_second=per_host,
        host_cores=per_host / run.images_per_core,
        host_bytes_per_second=None if mean is None else mean * per_host,
    )


def _notes(config: Config, derived: Derived, devices: int) -> tuple[str, ...]:
    notes = derived.notes()
    groups = config.model.batch_norm_groups
    if groups < devices:
        over = f"over {devices // groups} devices" if groups > 1 else "over all devices"
        notes.append(
            f"note: batch statistics are taken {over}; that exchange is left out"
        )
    if config.schedule.warmup_until_error is not None:
        notes.append(
            "note: the rate rises to "
            f"{config.optimizer.learning_rate:g} once the training error is below "
            f"{config.schedule.warmup_until_error:g}"
        )
    if config.schedule.kind == "plateau":
        notes.append("note: drops at plateaus of the held-out error are not foreseen")
    return tuple(notes)


def _check(
    devices: int,
    hosts: int,
    efficiency: float,
    images_per_core: float,
    mean_image_bytes: float | None,
    interconnect: float | None,
) -> None:
    if devices < 1 or hosts < 1:
        raise UserError("--devices and --hosts must be at least 1")
    if devices % hosts:
        lower = devices // hosts * hosts
        choices = " or ".join(str(n) for n in (lower, lower + hosts) if n)
        raise UserError(
            f"{devices} devices do not divide over {hosts} hosts: give --devices "
            f"{choices}, or other --hosts"
        )
    if not 0 < efficiency <= 1:
        raise UserError(
            f"--efficiency is the share of the peaks that is reached, above 0 and at "
            f"most 1, not {efficiency:g}"
        )
    positive = {
        "--images-per-core": images_per_core,
        "--image-bytes": mean_image_bytes,
        "--interconnect": interconnect,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise UserError(f"{name} must be above 0, not {value:g}")
