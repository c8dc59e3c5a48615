"""Trees of variables: blocks stacked for a loop or one by one, and parts of a net.

An unrolled net has ``stage1/block1``, ``stage1/block2``, ... A scanned net has
``stage1/block1`` and ``stage1/blocks``, whose arrays hold the other blocks along their
first axis. ``stack_blocks`` and ``unstack_blocks`` convert any collection or gradient,
bit for bit.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.errors import UserError, nearest

STACKED = "blocks"


def unstack_blocks(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a scanned or unrolled tree to the unrolled layout."""

    def unstack_stage(stage: Mapping[str, Any]) -> dict[str, Any]:
        result = dict(stage)
        stacked = result.pop(STACKED, {})
        for index in range(len(jax.tree.leaves(stacked)[0]) if stacked else 0):
            block = jax.tree.map(lambda leaf, i=index: leaf[i], stacked)
            result[f"block{index + 2}"] = block
        return result

    return _map_stages(unstack_stage, variables)


def stack_blocks(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Converts an unrolled or scanned tree to the scanned layout."""

    def stack_stage(stage: Mapping[str, Any]) -> dict[str, Any]:
        kept = dict(stage)
        names = [name for name in stage if re.fullmatch(r"block\d+", name)]
        names.sort(key=lambda name: int(name.removeprefix("block")))
        blocks = [kept.pop(name) for name in names if name != "block1"]
        if not blocks:
            return kept
        return kept | {STACKED: jax.tree.map(lambda *x: jnp.stack(x), *blocks)}

    return _map_stages(stack_stage, variables)


def is_stacked(variables: Mapping[str, Any]) -> bool:
    """Whether the blocks of any stage are stacked."""
    return any(
        STACKED in child or is_stacked(child)
        for child in variables.values()
        if isinstance(child, Mapping)
    )


def input_channels(params: Mapping[str, Any]) -> int:
    """Channels of the images that a net with these params takes.

    Raises:
      KeyError: the params begin with neither a stem nor a stage of convolutions.
    """
    first = params["stem" if "stem" in params else "stage1"]
    return first["conv" if "conv" in first else "conv1"]["kernel"].shape[-2]


def _map_stages(function, tree):
    """Applies ``function`` to the children named stage1, stage2, ... at any depth."""
    return {
        name: function(child)
        if re.fullmatch(r"stage\d+", name)
        else _map_stages(function, child)
        if isinstance(child, Mapping)
        else child
        for name, child in tree.items()
    }


_PARTS = ("stem", "stage", "layer", "norm", "bottleneck", "rpn", "fc", "head")
"""The parts of all nets, in the order in which an image passes them."""


def parts_in_order(params: Mapping[str, Any]) -> list[str]:
    """The names of a net's parts, from the images to the logits.

    JAX sorts the keys of dictionaries, so a tree alone does not tell.

    Args:
      params: the net's parameters, or a tree with the same top level.
    """

    def place(name: str) -> tuple[int, int]:
        kind = name.rstrip("0123456789")
        return _PARTS.index(kind), int(name.removeprefix(kind) or 0)

    return sorted(params, key=place)


def trainable_mask(params: Mapping[str, Any], frozen: Sequence[str]) -> dict[str, Any]:
    """A tree of booleans like ``params``: False in the frozen parts.

    With ``optax.multi_transform`` and this mask as labels, frozen parameters get no
    update, not even weight decay. To keep their running statistics too, build the net
    with ``batch_norm_frozen=frozen``.

    Args:
      params: the net's parameters.
      frozen: names of parts, ("stem", "stage1"), or paths within, "stage1/block1".

    Raises:
      UserError: the net lacks one of the parts.
    """
    mask = jax.tree.map(lambda leaf: True, dict(params))
    for part in frozen:
        _freeze(mask, part.split("/"), part)
    return mask


def _freeze(mask: dict[str, Any], path: Sequence[str], part: str) -> None:
    name, *rest = path
    if name not in mask:
        raise UserError(f"there is no part {part!r} to freeze; {nearest(name, mask)}")
    if not rest:
        mask[name] = jax.tree.map(lambda leaf: False, mask[name])
    elif isinstance(mask[name], dict):
        _freeze(mask[name], rest, part)
    else:
        raise UserError(
            f"there is no part {part!r} to freeze; {name} is an array, without parts"
        )
