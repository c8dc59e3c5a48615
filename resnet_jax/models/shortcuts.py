"""Shortcut connections: section 3.3 and Table 3 (He et al. 2015), and those which He et
al. 2016 compare with the identity ("Identity Mappings in Deep Residual Networks",
section 3 and Table 1).

A shortcut is a small frozen value that joins the two paths of a block:
``shortcut(x, residual, strides, conv, norm, dilation, train)`` returns the sum of the
residual function's output and of what it makes of the block's input. It is called
inside the block's compact scope, so that its layers stand beside the block's own as
``shortcut_conv``, ``shortcut_norm`` and ``shortcut_gate``.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.factories import ModuleFactory


class Shortcut(Protocol):
    """What a block needs of a shortcut."""

    def __call__(
        self,
        x: jax.Array,
        residual: jax.Array,
        strides: int,
        conv: ModuleFactory,
        norm: ModuleFactory,
        dilation: tuple[int, int] = (1, 1),
        train: bool = False,
    ) -> jax.Array:
        """Joins the block's input (n, h, w, c) and its residual function's output.

        ``dilation`` is the spacing of taps at the block's input and at its output;
        they differ where dilation stands for a stride. The sum has the shape of
        ``residual``.
        """
        ...


class Added:
    """Shortcuts that add an array to the residual function's output as it is.

    The array is a method of its own, so that a block can hand it to a normalisation
    that adds it itself (``models.fused``).
    """

    def addend(
        self,
        x: jax.Array,
        shape: tuple[int, ...],
        strides: int,
        conv: ModuleFactory,
        norm: ModuleFactory,
        dilation: tuple[int, int] = (1, 1),
    ) -> jax.Array | None:
        """What is added to an array of ``shape``; None: nothing."""
        raise NotImplementedError

    def __call__(self, x, residual, strides, conv, norm, dilation=(1, 1), train=False):
        """See ``Shortcut``."""
        added = self.addend(x, residual.shape, strides, conv, norm, dilation)
        return residual if added is None else residual + added


@dataclasses.dataclass(frozen=True)
class ZeroPad(Added):
    """Option A: the identity; where the shape changes, subsampled and zero-padded.

    See ``zero_pad``: no parameters and no multiply-adds.
    """

    def addend(self, x, shape, strides, conv, norm, dilation=(1, 1)):
        """See ``Added``. Raises ValueError where channels become fewer."""
        return zero_pad(x, shape, strides)


@dataclasses.dataclass(frozen=True)
class Projection(Added):
    """Options B and C: a 1x1 convolution and its normalisation, W_s x of equation 2.

    Option C is the "1x1 convolutional shortcut" of He et al. 2016 too, who replace the
    identities of ResNet-110 by it and say that it is option C.

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

    def addend(self, x, shape, strides, conv, norm, dilation=(1, 1)):
        """See ``Added``."""
        features = shape[-1]
        # By stride and width, not by shape: parameters must not depend on image sizes.
        unchanged = strides == 1 and x.shape[-1] == features
        if unchanged and not self.everywhere:
            return x
        if self.pooled:
            window = strides * dilation[1] // dilation[0]
            x, strides = average_pool(x, window, strides, dilation[0]), 1
        x = conv(features, (1, 1), strides=strides, name="shortcut_conv")(x)
        return norm(name="shortcut_norm")(x) if self.normalized else x


@dataclasses.dataclass(frozen=True)
class NoShortcut(Added):
    """The plain nets: nothing is added."""

    def addend(self, x, shape, strides, conv, norm, dilation=(1, 1)):
        """See ``Added``: nothing."""


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Constant scaling (He et al. 2016, section 3.1): both paths times a number.

    Where the shape changes, option A is what is scaled: the paper says that all but the
    shortcut's form is as in He et al. 2015, and names no other.

    Attributes:
      shortcut: the factor of the shortcut, lambda of the paper's equation 6.
      residual: the factor of the residual function.
    """

    shortcut: float = 0.5
    residual: float = 1.0

    def __call__(self, x, residual, strides, conv, norm, dilation=(1, 1), train=False):
        """See ``Shortcut``."""
        x = zero_pad(x, residual.shape, strides)
        return self.residual * residual + self.shortcut * x


@dataclasses.dataclass(frozen=True)
class Gated:
    """Gating (He et al. 2016, section 3.1) by g(x) = sigmoid(W_g x + b_g).

    The shortcut is multiplied by 1 - g(x). An exclusive gate multiplies the residual
    function by g(x), as highway layers do; a shortcut-only gate leaves it as it is. W_g
    is a 1x1 convolution of the block's input.

    The paper does not say how gates meet a change of shape. Here W_g has the block's
    stride and gives as many channels as its output, and what is multiplied is option A.
    Nor does it say whether a normalisation follows W_g; here none does, as equation and
    bias are written.

    Attributes:
      exclusive: whether the residual function is gated too.
      bias: the first value of b_g. The paper tries 0 and -1 to -10; -6 is its best for
        both kinds of gate.
    """

    exclusive: bool
    bias: float = -6.0

    def __call__(self, x, residual, strides, conv, norm, dilation=(1, 1), train=False):
        """See ``Shortcut``."""
        logits = conv(
            residual.shape[-1],
            (1, 1),
            strides=strides,
            use_bias=True,
            bias_init=nn.initializers.constant(self.bias),
            name="shortcut_gate",
        )(x)
        gate = nn.sigmoid(logits)
        if self.exclusive:
            residual = gate * residual
        return residual + (1 - gate) * zero_pad(x, residual.shape, strides)


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Dropout on the output of the shortcut (He et al. 2016, section 3.1), in training.

    Option A stands where the shape changes, as in ``Scaled``. What is kept is divided
    by 1 - ``rate``, as dropout is defined today, and so keeps its expectation; the
    paper's remark that its own halves it reads as if there it were not divided.

    Attributes:
      rate: the share of elements that become zero.
    """

    rate: float = 0.5

    def __call__(self, x, residual, strides, conv, norm, dilation=(1, 1), train=False):
        """See ``Shortcut``; draws from the rng "dropout"."""
        drop = nn.Dropout(self.rate, deterministic=not train, name="shortcut_dropout")
        return residual + drop(zero_pad(x, residual.shape, strides))


def zero_pad(x: jax.Array, shape: tuple[int, ...], strides: int) -> jax.Array:
    """Every ``strides``-th pixel of ``x``, and zero channels behind its own.

    Args:
      x: (n, h, w, c).
      shape: of the result: (n, ceil(h / strides), ceil(w / strides), at least c).
      strides: of both axes.

    Raises:
      ValueError: fewer channels than x has.
    """
    if x.shape == shape:
        return x
    x = x[:, ::strides, ::strides, :]
    extra = shape[-1] - x.shape[-1]
    if extra < 0:
        raise ValueError(
            f"shortcut A cannot go from {x.shape[-1]} to {shape[-1]} channels: it only "
            "appends zero channels; use a projection (B or C)"
        )
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra)))


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
    "scaled": Scaled(),
    "scaled_both": Scaled(residual=0.5),
    "exclusive_gate": Gated(exclusive=True),
    "shortcut_gate": Gated(exclusive=False),
    "dropout": Dropped(),
}
