"""Deeper nets that compute the same: the paper's solution by construction.

A deeper net can copy a shallower one and make the layers in between identities, so that
it ought never to be worse (section 1). ``deepen`` builds it from trained weights.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.errors import UserError
from resnet_jax.models.factories import class_of
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.shortcuts import NoShortcut
from resnet_jax.models.stages import Stage
from resnet_jax.models.trees import stack_blocks, unstack_blocks


def deepen(
    variables: Mapping[str, Any],
    model: ResNet,
    stage_sizes: Sequence[int],
    rng: jax.Array,
) -> tuple[ResNet, dict[str, Any]]:
    """Inserts identity blocks at the end of the stages of a trained residual net.

    The residual function of a new block is zero: the scale and bias of its last
    normalisation are, or with pre-activation its last kernel. So its output is its
    input, bit for bit, in evaluation and in training; its other weights are fresh, and
    it can learn. Compiled as a whole, two nets of different depth are two programs, and
    XLA may fuse and so round what is around the blocks differently, in the last bits.

    Args:
      variables: of ``model``, trained or not.
      model: a net with shortcuts A, B or pooled, and ordinary stages.
      stage_sizes: blocks of each stage of the deeper net, no fewer than the model's.
      rng: key of the new weights.

    Returns:
      The deeper model, and its variables.

    Raises:
      UserError: the net has no identity shortcuts, or would become shallower.
    """
    _check(model, stage_sizes)
    deeper = model.clone(stage_sizes=tuple(stage_sizes))
    old = unstack_blocks(variables)
    unrolled = deeper.clone(scan=False, remat=False)
    channels = _input_channels(old["params"])
    images = jnp.zeros((1, 32, 32, channels))
    fresh = jax.jit(functools.partial(unrolled.init, train=False))(rng, images)
    new: dict[str, Any] = {}
    for collection, tree in fresh.items():
        new[collection] = dict(old[collection])
        for index, (before, after) in enumerate(
            zip(model.stage_sizes, stage_sizes, strict=True)
        ):
            stage = f"stage{index + 1}"
            new[collection][stage] = dict(old[collection][stage])
            for number in range(before + 1, after + 1):
                block = tree[stage][f"block{number}"]
                if collection == "params":
                    block = _silenced(block, model.preactivation)
                new[collection][stage][f"block{number}"] = block
    return deeper, stack_blocks(new) if deeper.scan else new


def _silenced(block: Mapping[str, Any], preactivation: bool) -> dict[str, Any]:
    """The block with a residual function that is zero."""
    kind = "conv" if preactivation else "norm"
    last = max(name for name in block if name.startswith(kind))
    return dict(block) | {last: jax.tree.map(jnp.zeros_like, block[last])}


def _check(model: ResNet, stage_sizes: Sequence[int]) -> None:
    if not isinstance(model, ResNet) or class_of(model.stage) is not Stage:
        raise UserError("deepen needs a ResNet of ordinary stages")
    shortcut = model.shortcut
    if isinstance(shortcut, NoShortcut) or getattr(shortcut, "everywhere", False):
        raise UserError(
            "deepen needs identity shortcuts (A, B or pooled): a plain net has none, "
            "and option C projects in every block"
        )
    if len(stage_sizes) != len(model.stage_sizes) or any(
        after < before
        for before, after in zip(model.stage_sizes, stage_sizes, strict=True)
    ):
        raise UserError(
            f"deepen cannot go from stages of {tuple(model.stage_sizes)} blocks to "
            f"{tuple(stage_sizes)}: as many stages, and none with fewer blocks"
        )


def _input_channels(params: Mapping[str, Any]) -> int:
    stem = params["stem"]
    return stem["conv" if "conv" in stem else "conv1"]["kernel"].shape[2]
