"""Convolutions of a net, found during its call, under names of the unrolled net."""

import itertools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.conv import Conv
from resnet_jax.models.trees import STACKED

Path = tuple[str, ...]
"""A module's path in its net: ("stage1", "block2", "conv1")."""


def is_convolution(context: nn.module.InterceptorContext) -> bool:
    """Whether an intercepted call runs a convolution."""
    return context.method_name == "__call__" and isinstance(
        context.module, (Conv, nn.Conv)
    )


def leaf(tree: Mapping[str, Any], path: Path) -> Any:
    """The entry of a nested mapping."""
    for name in path:
        tree = tree[name]
    return tree


def is_stacked(path: Path) -> bool:
    """Whether a module is in a loop, so that its arrays have an axis of rounds."""
    return STACKED in path


@flax.struct.dataclass
class PerLayer:
    """An array for each layer of a net, stacked; a jitted function may return it."""

    layers: tuple[str, ...] = flax.struct.field(pytree_node=False)
    values: jax.Array


def unrolled(values: Mapping[Path, jax.Array]) -> PerLayer:
    """Arrays under the names of the unrolled net, in the order of the calls.

    Args:
      values: by path, in the order of the calls, at least one. Those of a module in a
        loop have the loop's rounds as leading axis.

    Returns:
      Names such as "stage1/block2/conv1"; a loop's rounds count as blocks.
    """
    layers = {}
    for loop, group in itertools.groupby(values, key=_loop):
        paths = list(group)
        if loop is None:
            layers.update({"/".join(path): values[path] for path in paths})
            continue
        for index in range(len(values[paths[0]])):
            for path in paths:
                inside = path[len(loop) + 1 :]
                # block1 comes before the loop.
                name = "/".join((*loop, f"block{index + 2}", *inside))
                layers[name] = values[path][index]
    return PerLayer(tuple(layers), jnp.stack(list(layers.values())))


def _loop(path: Path) -> Path | None:
    """The path of the loop that runs a module, if any."""
    return path[: path.index(STACKED)] if is_stacked(path) else None
