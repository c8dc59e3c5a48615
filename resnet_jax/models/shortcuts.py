"""The shortcut connections of section 3.3 and Table 3 (He et al. 2015).

A shortcut is a small frozen value: ``shortcut(x, like, strides, conv, norm)``
returns what is added to the residual function's output, an array of the same
shape as ``like``, or None where nothing is added. It is called inside the block's
compact scope, so that its layers stand beside the block's own as
``shortcut_conv`` and ``shortcut_norm``.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from resnet_jax.models.normalization import ModuleFactory


class Shortcut(Protocol):
    """What a block needs of a shortcut."""

    def __call__(
        self,
        x: jax.Array,
        like: jax.Array,
        strides: int,
        conv: ModuleFactory,
        norm: ModuleFactory,
    ) -> jax.Array | None:
        """Maps the block's input (n, h, w, c) to the shape of ``like``, or None."""
        ...


@dataclasses.dataclass(frozen=True)
class ZeroPad:
    """Option A: the identity; where the shape changes, subsampled and zero-padded.

    Every ``strides``-th pixel is kept and zero channels are appended: no
    parameters and no multiply-adds.
    """

    def __call__(self, x, like, strides, conv, norm):
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
    """

    everywhere: bool = False

    def __call__(self, x, like, strides, conv, norm):
        """See ``Shortcut``."""
        # By stride and width, not by shape: parameters must not depend on image sizes.
        unchanged = strides == 1 and x.shape[-1] == like.shape[-1]
        if unchanged and not self.everywhere:
            return x
        x = conv(like.shape[-1], (1, 1), strides=strides, name="shortcut_conv")(x)
        return norm(name="shortcut_norm")(x)


@dataclasses.dataclass(frozen=True)
class NoShortcut:
    """The plain nets: nothing is added."""

    def __call__(self, x, like, strides, conv, norm):
        """See ``Shortcut``."""
        del x, like, strides, conv, norm


BY_NAME: dict[str, Shortcut] = {
    "A": ZeroPad(),
    "B": Projection(),
    "C": Projection(everywhere=True),
    "none": NoShortcut(),
}
