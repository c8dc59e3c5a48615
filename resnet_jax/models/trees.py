"""Variables by the names of their blocks: stacked for a loop, or one by one.

The same net has two trees. Unrolled: ``stage1/block1``, ``stage1/block2``, ... Scanned
(``ResNet(scan=True)``): ``stage1/block1`` and ``stage1/blocks``, whose arrays hold all
further blocks along their first axis. The functions here convert in both directions,
bit for bit, and take any collection or gradient of that shape.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

STACKED = "blocks"


def unstack_blocks(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The unrolled tree of a scanned or an unrolled one."""

    def unstack_stage(stage: Mapping[str, Any]) -> dict[str, Any]:
        result = {name: child for name, child in stage.items() if name != STACKED}
        if STACKED in stage:
            count = jax.tree.leaves(stage[STACKED])[0].shape[0]
            for index in range(count):
                block = jax.tree.map(lambda leaf, i=index: leaf[i], stage[STACKED])
                result[f"block{index + 2}"] = block
        return result

    return _map_stages(unstack_stage, variables)


def stack_blocks(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The scanned tree of an unrolled or a scanned one."""

    def stack_stage(stage: Mapping[str, Any]) -> dict[str, Any]:
        numbers = sorted(
            int(match[1])
            for name in stage
            if (match := re.fullmatch(r"block(\d+)", name)) and int(match[1]) > 1
        )
        if not numbers:
            return dict(stage)
        blocks = [stage[f"block{number}"] for number in numbers]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        rest = {f"block{number}" for number in numbers}
        kept = {name: child for name, child in stage.items() if name not in rest}
        return kept | {STACKED: stacked}

    return _map_stages(stack_stage, variables)


def is_stacked(variables: Mapping[str, Any]) -> bool:
    """Whether some stage's blocks lie stacked."""
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
