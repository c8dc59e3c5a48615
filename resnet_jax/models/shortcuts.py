"""The shortcut connections of section 3.3 and Table 3 (He et al. 2015).

A shortcut is a small frozen value: ``shortcut(x, like, strides, conv, norm, dilation)``
returns what is added to the residual function's output, an array of the same
shape as ``like``, or None where nothing is added. It is called inside the block's
compact scope, so that its layers stand beside the block's own as
``shortcut_conv`` and ``shortcut_norm``.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from resnet_jax.models.factories import ModuleFactory


class Shortcut(Protocol):
    """What a block needs of a shortcut."""

    def __call__(
        self,
        x: jax.Array,
        like: jax.Array,
        strides: int,
        conv: ModuleFactory,
        norm: ModuleFactory,
        dilation: tuple[int, int] = (1, 1),
    ) -> jax.Array | None:
        """Maps the block's input (n, h, w, c) to the shape of ``like``, or None.

        ``dilation`` is the spacing of taps at the block's input and at its output;
        they differ where dilation stands for a stride.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ZeroPad:
    """Option A: the identity; where the shape changes, subsampled and zero-padded.

    Every ``strides``-th pixel is kept and zero channels are appended: no
    parameters and no multiply-adds.
    """

    def __call__(self, x, like, strides, conv, norm, dilation=(1, 1)):
        """See ``Shortcut``. Raises ValueError where channels become fewer."""
        if x.shape == like.shape:
            return x
        x = x[:, ::strides, ::strides, :]
        extra = like.shape[-1] - x.shape[-1]
        if extra < 0:
            raise ValueError(
                f"shortcut A cannot go from {x.shape[-1]} to {like.shape[-1]} "
                "channels: it only appends zero channels; use a projection (B or C)"
            )
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra)))


@dataclasses.dataclass(frozen=True)
class Projection:
    """Options B and C: a 1x1 convolution and its normalisation, W_s x of equation 2.

    Attributes:
      everywhere: False is option B, the projection only where the shape changes and
        the identity elsewhere; True is option C, the projection in every block.
      normalized: False leaves the normalisation out, as pre-activation nets do.
      pooled: averages 2x2 pixels where the map is halved and projects with stride 1,
        so that no pixel is skipped (ResNet-D, He et al. 2019).
    """

    everywhere: bool = False
    normalized: bool = True
    pooled: bool = False

    def __call__(self, x, like, strides, conv, norm, dilation=(1, 1)):
        """See ``Shortcut``."""
        # By stride and width, not by shape: parameters must not depend on image sizes.
        unchanged = strides == 1 and x.shape[-1] == like.shape[-1]
        if unchanged and not self.everywhere:
            return x
        if self.pooled:
            window = strides * dilation[1] // dilation[0]
            x, strides = average_pool(x, window, strides, dilation[0]), 1
        x = conv(like.shape[-1], (1, 1), strides=strides, name="shortcut_conv")(x)
        return norm(name="shortcut_norm")(x) if self.normalized else x


@dataclasses.dataclass(frozen=True)
class NoShortcut:
    """The plain nets: nothing is added."""

    def __call__(self, x, like, strides, conv, norm, dilation=(1, 1)):
        """See ``Shortcut``."""
        del x, like, strides, conv, norm, dilation


def average_pool(
    x: jax.Array, window: int, strides: int, dilation: int = 1
) -> jax.Array:
    """Means of ``window`` x ``window`` pixels, of those that lie within the map.

    (n, h, w, c) to (n, ceil(h / strides), ceil(w / strides), c): the last windows of
    an odd side average the pixels that are there, and so do those of stride 1.
    """
    height, width = (-(-side // strides) for side in x.shape[1:3])
    reach = (window - 1) * dilation
    inside = jnp.ones((1, *x.shape[1:3], 1), x.dtype)

    def window_sum(maps):
        padded = jnp.pad(maps, ((0, 0), (0, reach), (0, reach), (0, 0)))
        offsets = range(0, reach + 1, dilation)
        return sum(
            padded[
                :,
                top : top + (height - 1) * strides + 1 : strides,
                left : left + (width - 1) * strides + 1 : strides,
            ]
            for top in offsets
            for left in offsets
        )

    return window_sum(x) / window_sum(inside)


BY_NAME: dict[str, Shortcut] = {
    "A": ZeroPad(),
    "B": Projection(),
    "C": Projection(everywhere=True),
    "pooled": Projection(pooled=True),
    "none": NoShortcut(),
}
