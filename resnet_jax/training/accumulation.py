"""Gradient accumulation: a batch in parts, one after another, in less memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from resnet_jax import parallel
from resnet_jax.models.conv import loop_algorithm


def micro_batches(batch: Any, count: int, unit: int, mesh: Mesh | AbstractMesh) -> Any:
    """Cuts a global batch into equal parts; inside jit.

    Consecutive examples form units, and unit u belongs to part u mod ``count``: the
    same examples on any number of devices. If ``count`` times the number of devices
    divides the number of units, each device already has its share of every part and
    nothing moves. Otherwise the compiler moves what it must.

    Args:
      batch: a tree of arrays (n, ...), cut over the devices along their first axis.
      count: parts; divides the number of units.
      unit: consecutive examples that stay together, such as a group of batch
        normalisation; divides n.
      mesh: the devices.

    Returns:
      A tree of arrays (count, n / count, ...), each part cut over the devices.
    """

    def cut(array: jax.Array) -> jax.Array:
        shape = array.shape[1:]
        units = array.reshape(-1, count, unit, *shape)
        parts = units.swapaxes(0, 1).reshape(count, -1, *shape)
        return lax.with_sharding_constraint(parts, parallel.steps_sharding(mesh))

    return jax.tree.map(cut, batch)


def add_over_parts(function: Callable[[Any], Any], parts: Any) -> Any:
    """The sum of ``function`` over parts, with one part in memory at a time.

    It is a compiled loop: the program does not grow with the number of parts. (In an
    unrolled loop XLA:CPU keeps the maps of all parts in memory, barriers or not.)

    Args:
      function: of one part to a tree of arrays.
      parts: a tree of arrays (count, ...).
    """
    first = jax.tree.map(lambda array: array[0], parts)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first)
    )

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(part)), None

    total, _ = lax.scan(add, zeros, parts)
    return total


def in_loop(model: nn.Module, count: int) -> nn.Module:
    """The net for one of ``count`` micro-batches, inside a compiled loop.

    It has its share of the batch normalisation groups, and convolutions that suit a
    loop; see ``loop_algorithm``.
    """
    options: dict[str, Any] = {}
    groups = getattr(model, "batch_norm_groups", 1)
    if groups > 1:
        norm: Any = getattr(model, "norm", None)
        options["norm"] = functools.partial(norm, groups=groups // count)
    if hasattr(model, "conv_algorithm"):
        options["conv_algorithm"] = loop_algorithm(model.conv_algorithm)
    return model.clone(**options)
