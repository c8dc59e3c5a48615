"""The device mesh, and how arrays are distributed over it."""

import collections
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from resnet_jax.errors import UserError

Tree = TypeVar("Tree")

_MARKS = 8  # of ``InFlight``, at most
SMALL_LEAF = 2**12
"""Arrays with fewer elements are always replicated."""


def data_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of all or some devices with one Auto axis, ``data``, to shard batches.

    The devices of a process are neighbours, so each process reads consecutive examples.

    Raises:
      UserError: jax finds no device.
    """
    try:
        devices = jax.devices()[:num_devices]
    except (RuntimeError, AssertionError) as error:
        # jax asserts if this machine has none of the platforms in JAX_PLATFORMS.
        reason = str(error).split("\n")[0] or "no platform of JAX_PLATFORMS is here"
        raise UserError(f"jax finds no device: {reason}") from error
    devices.sort(key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def local_mesh() -> Mesh:
    """A mesh like ``data_mesh`` of this process's devices alone."""
    mine = [d for d in data_mesh().devices if d.process_index == jax.process_index()]
    return Mesh(np.array(mine), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def steps_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The second axis split over the devices, for the batches of several steps."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def fully_sharded(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The shardings of a state that is split over the devices.

    Each array or shape of ``tree`` is split along its largest axis that the number of
    devices divides. Small arrays are replicated, because gathering them costs more.
    """

    def sharding(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if not axes or math.prod(leaf.shape) < SMALL_LEAF:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "data"))

    return jax.tree.map(sharding, tree)


def gathered(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The leaves, replicated on every device; for use inside jit."""
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def on_each_device(
    function: Callable[..., Any], mesh: Mesh, shared: int = 0
) -> Callable[..., Any]:
    """The function, applied by each device to its own part of batches; inside jit.

    The devices exchange nothing.

    Args:
      function: of trees of arrays (n, ...), cut over the devices along their first
        axis. So is its result.
      mesh: the devices.
      shared: how many of the first arguments every device gets whole.
    """
    batch = PartitionSpec("data")

    def call(*arguments: Any) -> Any:
        specs = [PartitionSpec()] * shared + [batch] * (len(arguments) - shared)
        return jax.shard_map(
            function, mesh=mesh, in_specs=tuple(specs), out_specs=batch, check_vma=False
        )(*arguments)

    return call


def settled(tree: Tree) -> Tree:
    """Returns ``tree``; waits for it first if one CPU simulates several devices.

    Simulated devices share one thread pool. Programs in flight together can block each
    other's collectives, and XLA then ends the process after 40 seconds. A loop that
    dispatches programs calls this between them.
    """
    devices = jax.tree.leaves(tree)[0].sharding.addressable_devices
    if len(devices) > 1 and next(iter(devices)).platform == "cpu":
        jax.block_until_ready(tree)
    return tree


class InFlight:
    """Keeps the programs that wait on the devices to about ``seconds`` of work.

    jax dispatches programs ahead of the devices, and a run that is to stop must wait
    for all of them. One program always waits, so the devices are never idle.
    """

    def __init__(self, seconds: float = 0.5):
        self._seconds = seconds
        # Results, each with the number of programs since the one before.
        self._marks: collections.deque[tuple[jax.Array, int]] = collections.deque()
        self._unmarked, self._stride, self._depth = 0, 1, 1
        self._done_at = 0.0

    def add(self, mark: Callable[[], jax.Array]) -> None:
        """Counts a dispatched program; waits for an earlier one if too many wait.

        Args:
          mark: returns a small result of the program that is not donated to the next
            one. It is not called for each of many quick programs.
        """
        self._unmarked += 1
        if self._unmarked < self._stride:
            return
        self._marks.append((mark(), self._unmarked))
        self._unmarked = 0
        while len(self._marks) > self._depth:
            result, count = self._marks.popleft()
            result.block_until_ready()
            # A steady loop ends as many programs as it dispatches.
            between = time.perf_counter() - self._done_at
            self._done_at += between
            programs = int(self._seconds * count / max(between, 1e-6))
            programs = min(programs, 2 * self._depth * self._stride)
            self._stride = max(1, programs // _MARKS)
            self._depth = max(1, min(_MARKS, programs // self._stride))


def check_divides(
    global_batch_size: int, num_devices: int, micro_batches: int = 1, groups: int = 1
) -> None:
    """Raises UserError if a batch does not split evenly over micro-batches and devices.

    The sizes suggested also divide by the ``groups`` of batch normalisation.
    """
    parts = num_devices * micro_batches
    if global_batch_size % parts == 0:
        return
    whole = math.lcm(parts, groups)
    lower = global_batch_size // whole * whole
    choices = [str(size) for size in (lower, lower + whole) if size]
    over = f"{num_devices} devices"
    if micro_batches > 1:
        over = f"training.micro_batches={micro_batches} times {over}"
    raise UserError(
        f"training.global_batch_size={global_batch_size} does not divide over {over}; "
        f"the nearest that {'do are' if len(choices) > 1 else 'does is'} "
        f"{' and '.join(choices)}"
    )


def check_processes(mesh: Mesh) -> None:
    """Raises UserError if processes have unequal numbers of devices.

    Each process feeds its devices an equal part of every batch.
    """
    owners = [device.process_index for device in mesh.devices.flat]
    _, counts = np.unique(owners, return_counts=True)
    if counts.min() != counts.max():
        raise UserError(
            f"the processes have {', '.join(map(str, counts))} devices, but each reads "
            "an equal part of every batch: give every process the same number"
        )


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Device arrays from the part of each array that this process holds."""
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array), tree
    )


def place_whole(tree: Any, shardings: Any) -> Any:
    """Device arrays from host arrays that every process holds whole."""

    def placed(array: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(placed, tree, shardings)


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The smallest batch of at least ``batch_size`` that divides over the devices."""
    return -(-batch_size // mesh.size) * mesh.size
