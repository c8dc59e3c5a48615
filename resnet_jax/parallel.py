"""The device mesh and how arrays lie on it."""

import math
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from resnet_jax.errors import UserError

Tree = TypeVar("Tree")

SMALL_LEAF = 2**12
"""Arrays of fewer elements are never cut over the devices."""


def data_mesh(num_devices: int | None = None) -> Mesh:
    """Devices along one axis, ``data``, over which batches are cut; all by default.

    The axis is Auto: programs are written for the global batch, and the compiler
    places them. Devices of one process lie side by side, so that a process reads a run
    of consecutive examples, whatever the order of the network.
    """
    try:
        devices = jax.devices()[:num_devices]
    except (RuntimeError, AssertionError) as error:
        # jax asserts where JAX_PLATFORMS names only what this machine lacks.
        reason = str(error).split("\n")[0] or "none of JAX_PLATFORMS is here"
        raise UserError(f"jax finds no device: {reason}") from error
    devices.sort(key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The leading axis cut over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def steps_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The second axis cut over the devices: batches of several steps, or parts."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def fully_sharded(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of each leaf when a state is cut over the devices.

    A leaf is cut along its largest axis that the number of devices divides. It stays
    replicated where there is none, or where it is small: gathering it would cost more
    than it saves.

    Args:
      tree: of arrays or of their shapes.
      mesh: the devices.
    """

    def sharding(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if not axes or math.prod(leaf.shape) < SMALL_LEAF:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "data"))

    return jax.tree.map(sharding, tree)


def gathered(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Whole arrays on every device, of leaves that may be cut; inside jit."""
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def settled(tree: Tree) -> Tree:
    """``tree`` as it is, but waited for where one CPU simulates several devices.

    Simulated devices share a pool of as many threads. Programs in flight together can
    hold threads that each other's collectives wait for, and XLA then ends the process
    after 40 seconds: seen within a minute with evaluations of 8 devices on 2 cores. A
    loop that gives the devices one program after another calls this in between.

    Args:
      tree: what a program returned: arrays on the same devices.
    """
    devices = jax.tree.leaves(tree)[0].sharding.addressable_devices
    if len(devices) > 1 and next(iter(devices)).platform == "cpu":
        jax.block_until_ready(tree)
    return tree


def check_divides(
    global_batch_size: int, num_devices: int, micro_batches: int = 1, groups: int = 1
) -> None:
    """Raises UserError where a batch cannot be cut as it must be.

    Args:
      global_batch_size: examples a step.
      num_devices: each computes its even share of every micro-batch.
      micro_batches: parts of the batch that are computed one after another.
      groups: of batch normalisation; valid choices divide into these too.
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
    """Raises UserError where processes have unequal numbers of the devices.

    Each feeds an equal part of every batch to its own.
    """
    owners = [device.process_index for device in mesh.devices.flat]
    _, counts = np.unique(owners, return_counts=True)
    if counts.min() != counts.max():
        raise UserError(
            f"the processes have {', '.join(map(str, counts))} devices, and each "
            "reads an equal part of every batch: start them with equally many"
        )


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Each process's part of arrays, as device arrays of one sharding."""
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array), tree
    )


def place_whole(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole, as device arrays.

    Args:
      tree: of host arrays.
      shardings: a tree of shardings like it.
    """

    def placed(array: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(placed, tree, shardings)


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The smallest batch of at least ``batch_size`` that divides over the devices."""
    return -(-batch_size // mesh.size) * mesh.size
