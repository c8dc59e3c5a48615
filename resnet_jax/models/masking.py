"""Images of several sizes in one padded batch, with the features of each image alone.

A batch of images, each padded below and to the right to one size, compiles once. But a
net sees the padding: its biases turn zeros into other numbers, and 3x3 taps carry those
back into the image. Here every convolution and pooling gets zeros (or minus infinity)
outside each image, which is what it sees at the edge of an image alone.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.conv import Conv
from resnet_jax.models.pooling import Pool, inside


def apply_masked(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    sizes: jax.Array,
    **options: Any,
) -> Any:
    """``model.apply`` on padded images, in evaluation.

    Each image gets the logits it has alone, up to rounding. So do the maps of
    ``method="features"`` inside ``sizes_of_map``; outside they are undefined.

    Args:
      model: any net of this library that takes images.
      variables: its params and batch_stats.
      images: (n, h, w, c), normalised; what is outside an image has no effect. h and w
        are multiples of the net's largest stride.
      sizes: integers (n, 2), height and width of each image in its top left corner.
      **options: of ``model.apply``, such as ``method="features"``.

    Raises:
      ValueError: h or w is no multiple of a stride.
    """
    with masked(images.shape[1:3], sizes):
        return model.apply(variables, images, train=False, **options)


def masked(
    padded: tuple[int, ...], sizes: jax.Array
) -> contextlib.AbstractContextManager[None]:
    """Within it, the convolutions and poolings of a net do not see the padding.

    Args:
      padded: height and width of the batch.
      sizes: integers (n, 2), height and width of each image.
    """
    return nn.intercept_methods(_masking(padded, sizes))


def sizes_of_map(sizes: jax.Array, stride: int) -> jax.Array:
    """Height and width (n, 2) of each image's part of a map with a stride."""
    return -(-sizes // stride)


def _masking(padded: tuple[int, ...], sizes: jax.Array) -> Callable[..., Any]:
    """An interceptor that hides the padding from convolutions and poolings."""
    # Sizes of maps by stride; poolings that round down add theirs.
    known = {1: sizes}

    def stride_of(x: jax.Array) -> int:
        stride = padded[0] // x.shape[1]
        if padded != (stride * x.shape[1], stride * x.shape[2]):
            raise ValueError(
                f"images padded to {padded[0]}x{padded[1]} have maps of "
                f"{x.shape[1]}x{x.shape[2]}: pad them to multiples of the net's stride"
            )
        return stride

    def sizes_of(stride: int) -> jax.Array:
        before = max(other for other in known if stride % other == 0)
        return sizes_of_map(known[before], stride // before)

    def intercept(
        call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, context: Any
    ) -> Any:
        if context.method_name != "__call__" or not args:
            return call(*args, **kwargs)
        module, x = context.module, args[0]
        if isinstance(module, Conv):
            x = jnp.where(inside(x, sizes_of(stride_of(x))), x, 0)
            return call(x, *args[1:], **kwargs)
        if isinstance(module, Pool):
            stride = stride_of(x)
            own = sizes_of(stride)
            if module.rounds_down:
                known[2 * stride] = own // 2
            return call(x, own)
        return call(*args, **kwargs)

    return intercept
