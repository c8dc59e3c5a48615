"""Inference without batch normalisation: it is folded into the convolutions.

With running statistics, a normalisation is a scale and an offset per channel, which the
convolution before it absorbs.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.errors import UserError
from resnet_jax.models.factories import class_of, option_of
from resnet_jax.models.norm import BatchNorm, NoNorm
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.trees import input_channels
from resnet_jax.models.vgg import VGG


def fold_batch_norm(
    model: ResNet | VGG, variables: Mapping[str, Any]
) -> tuple[ResNet | VGG, dict[str, Any]]:
    """The net without normalisation that computes the same in evaluation.

    With s = scale / sqrt(var + epsilon), a convolution's kernel becomes ``kernel * s``
    and its bias ``(its bias - mean) * s + the normalisation's bias``. In float32 the
    two nets agree up to rounding. In bfloat16 the folded net rounds the product instead
    of the kernel, and its maps before the bias instead of after the normalisation.
    Do not train the folded net.

    Args:
      model: a net in which each normalisation follows a convolution: a ResNet in the
        order of the paper, or a VGG; scanned or not.
      variables: its params and batch_stats.

    Returns:
      The model without normalisation, and its variables: ``params`` alone.

    Raises:
      UserError: the net has no batch normalisation, or one that does not follow a
        convolution (pre-activation), or the variables do not match the model.
    """
    folded_model = _without_norms(model)
    given = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    if jax.tree.map(jnp.shape, given) != _shapes(model, given["params"]):
        raise UserError(
            f"the variables do not fit this {type(model).__name__}: give the model "
            "that they belong to"
        )
    epsilon = option_of(model.norm, "epsilon")
    folded = _folded(given["params"], given["batch_stats"], epsilon)
    return folded_model, {"params": folded}


def _shapes(model: ResNet | VGG, params: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of the model's variables, by the images' channels in ``params``."""
    try:
        images = jnp.zeros((1, 32, 32, input_channels(params)))
    except KeyError:
        return {}
    init = functools.partial(model.init, train=False)
    fresh = jax.eval_shape(init, jax.random.key(0), images)
    return jax.tree.map(jnp.shape, dict(fresh))


def _without_norms(model: ResNet | VGG) -> ResNet | VGG:
    if isinstance(model, VGG) and model.batch_norm:
        return model.clone(batch_norm=False)
    if isinstance(model, ResNet) and class_of(model.norm) is BatchNorm:
        if model.preactivation:
            raise UserError(
                "batch normalisation cannot be folded in a pre-activation net, where "
                "it follows a sum, not a convolution"
            )
        block = model.block
        if getattr(block, "keywords", {}).get("zero_init_last"):
            block = functools.partial(block, zero_init_last=False)
        return model.clone(norm=NoNorm, block=block)
    raise UserError(
        f"there is no batch normalisation to fold in this {type(model).__name__}: give "
        "a ResNet or a VGG with batch normalisation"
    )


def _folded(
    params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
    """The tree of params with every ``...norm...`` folded into its ``...conv...``."""
    new: dict[str, Any] = {}
    for name, layer in params.items():
        norm = name.replace("conv", "norm")
        if "norm" in name:
            continue
        if norm in params and "conv" in name:
            new[name] = _fold(layer, params[norm], stats[norm], epsilon)
        elif "conv" in name:
            # A projection without normalisation: the folded net's has a bias.
            zeros = jnp.zeros_like(layer["kernel"][..., 0, 0, 0, :])
            new[name] = {"bias": zeros} | dict(layer)
        elif name in stats:
            new[name] = _folded(layer, stats[name], epsilon)
        else:
            new[name] = layer
    return new


def _fold(
    conv: Mapping[str, jax.Array],
    norm: Mapping[str, jax.Array],
    stats: Mapping[str, jax.Array],
    epsilon: float,
) -> dict[str, jax.Array]:
    """Kernel (..., h, w, in, out) and bias (..., out); in front, stacked blocks."""
    slope = norm["scale"] * jax.lax.rsqrt(stats["var"] + epsilon)
    bias = conv.get("bias", 0.0)
    return {
        "kernel": conv["kernel"] * slope[..., None, None, None, :],
        "bias": (bias - stats["mean"]) * slope + norm["bias"],
    }
