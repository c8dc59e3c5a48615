"""Deeper nets that compute the same function: the paper's solution by construction.

A deeper net can copy a shallower one and make the added layers identities, so it should
never be worse (section 1). ``deepen`` builds that net from trained weights.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.errors import UserError
from resnet_jax.models.blocks import BasicBlock
from resnet_jax.models.factories import class_of, option_of
from resnet_jax.models.norm import BatchNorm, NoNorm
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.shortcuts import NoShortcut, Projection, ZeroPad
from resnet_jax.models.stages import Stage
from resnet_jax.models.trees import input_channels, stack_blocks, unstack_blocks


def deepen(
    variables: Mapping[str, Any],
    model: ResNet,
    stage_sizes: Sequence[int],
    rng: jax.Array,
) -> tuple[ResNet, dict[str, Any]]:
    """Inserts identity blocks at the end of the stages of a trained net.

    In a residual net, F(x) of a new block is zero because the last layer of F is: its
    last normalisation, or its last convolution with pre-activation or without
    normalisation. Its output equals its input bit for bit, in evaluation and training.
    Its other weights are fresh, so it can learn.

    In a plain net, every new layer is an identity: the kernels copy the centre pixel,
    the normalisations have mean 0, variance 1 - epsilon, scale 1 and bias 0, and ReLU
    changes nothing because its input is never negative. In training, the batch's
    statistics change the map, unless the net has no normalisation or a frozen one.

    XLA may round the layers around the new blocks differently in the last bits, because
    two nets of different depth are two programs.

    Args:
      variables: of ``model``, trained or not.
      model: a net of ordinary stages with shortcuts A, B or pooled, or a plain net of
        basic blocks in the order of the paper.
      stage_sizes: blocks of each stage of the deeper net, no fewer than the model's.
      rng: key of the new weights.

    Raises:
      UserError: the net's blocks cannot be identities, or the result is shallower.
    """
    _check(model, stage_sizes)
    deeper = model.clone(stage_sizes=tuple(stage_sizes))
    old = unstack_blocks(variables)
    unrolled = deeper.clone(scan=False, remat=False)
    channels = input_channels(old["params"])
    images = jnp.zeros((1, 32, 32, channels))
    fresh = jax.jit(functools.partial(unrolled.init, train=False))(rng, images)
    normalized = class_of(model.norm) is BatchNorm
    epsilon = option_of(model.norm, "epsilon") if normalized else 0.0
    new: dict[str, Any] = {}
    for collection, tree in fresh.items():
        new[collection] = dict(old[collection])
        for index, before in enumerate(model.stage_sizes):
            name = f"stage{index + 1}"
            stage = new[collection][name] = dict(old[collection][name])
            for number in range(before + 1, stage_sizes[index] + 1):
                block = tree[name][f"block{number}"]
                if isinstance(model.shortcut, NoShortcut):
                    block = _identity(block, epsilon)
                elif collection == "params":
                    block = _silenced(block, model)
                stage[f"block{number}"] = block
    return deeper, stack_blocks(new) if deeper.scan else new


def _silenced(block: Mapping[str, Any], model: ResNet) -> dict[str, Any]:
    """The block with F(x) = 0: the layer that ends F is zero."""
    bare = model.preactivation or class_of(model.norm) is NoNorm
    last = max(name for name in block if name.startswith("conv" if bare else "norm"))
    return dict(block) | {last: jax.tree.map(jnp.zeros_like, block[last])}


def _identity(block: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
    """The block's params or batch_stats, such that each layer is the identity."""
    # In float32 this variance plus epsilon is exactly 1.
    values = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0 - epsilon}

    def fill(path: Any, leaf: jax.Array) -> jax.Array:
        name = path[-1].key
        if name != "kernel":
            return jnp.full_like(leaf, values[name])
        centre = tuple(size // 2 for size in leaf.shape[:2])
        copy = jnp.eye(leaf.shape[-1], dtype=leaf.dtype)
        return jnp.zeros_like(leaf).at[centre].set(copy)

    return dict(jax.tree_util.tree_map_with_path(fill, block))


def _check(model: ResNet, stage_sizes: Sequence[int]) -> None:
    if not isinstance(model, ResNet) or class_of(model.stage) is not Stage:
        raise UserError("deepen needs a ResNet of ordinary stages")
    shortcut = model.shortcut
    if isinstance(shortcut, NoShortcut):
        _check_plain(model)
    elif not isinstance(shortcut, (ZeroPad, Projection)) or (
        isinstance(shortcut, Projection) and shortcut.everywhere
    ):
        raise UserError(
            "deepen needs identity shortcuts (A, B or pooled) or a plain net: option C "
            "projects in every block, and others scale, gate or drop what they carry"
        )
    if len(stage_sizes) != len(model.stage_sizes) or any(
        after < before
        for before, after in zip(model.stage_sizes, stage_sizes, strict=True)
    ):
        raise UserError(
            f"deepen cannot go from stages of {tuple(model.stage_sizes)} blocks to "
            f"{tuple(stage_sizes)}: give as many stages, none shorter"
        )


def _check_plain(model: ResNet) -> None:
    block = model.block(model.width, 1, NoNorm)
    if (
        class_of(model.norm) not in (BatchNorm, NoNorm)
        or type(block) is not BasicBlock
        or block.squeeze_excite is not None
        or block.activation is not nn.relu
    ):
        raise UserError(
            "deepen needs plain nets of basic blocks, each layer a convolution, a "
            "normalisation and a ReLU: only such layers can be identities"
        )
