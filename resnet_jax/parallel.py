"""The device mesh and how arrays lie on it."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from resnet_jax.errors import UserError


def data_mesh(num_devices: int | None = None) -> Mesh:
    """Devices along one axis, ``data``, over which batches are cut; all by default.

    The axis is Auto: programs are written for the global batch, and the compiler
    places them.
    """
    try:
        devices = jax.devices()[:num_devices]
    except (RuntimeError, AssertionError) as error:
        # jax asserts where JAX_PLATFORMS names only what this machine lacks.
        reason = str(error).split("\n")[0] or "none of JAX_PLATFORMS is here"
        raise UserError(f"jax finds no device: {reason}") from error
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis cut over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_divides(global_batch_size: int, mesh: Mesh) -> None:
    """Raises UserError where a batch cannot be cut over the devices."""
    if global_batch_size % mesh.size:
        lower = global_batch_size // mesh.size * mesh.size
        choices = [str(size) for size in (lower, lower + mesh.size) if size]
        raise UserError(
            f"training.global_batch_size={global_batch_size} does not divide over "
            f"{mesh.size} devices; the nearest that do are {' and '.join(choices)}"
        )


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays as device arrays of the given sharding."""
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array), tree
    )
