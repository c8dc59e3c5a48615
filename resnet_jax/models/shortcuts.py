"""Shortcut connections of residual blocks.

Options A, B and C are from He et al. 2015 (section 3.3, Table 3). The scaled, gated and
dropped ones are those that He et al. 2016 compare with the identity ("Identity Mappings
in Deep Residual Networks", section 3 and Table 1).

A shortcut is a small frozen value. Its layers, ``shortcut_conv``, ``shortcut_norm`` and
``shortcut_gate``, belong to the block that calls it.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.factories import ModuleFactory
from resnet_jax.models.pooling import Pool, average_pool


class Shortcut(Protocol):
    """The interface of shortcuts."""

    def __call__(
        self,
        x: jax.Array,
        features: int,
        strides: int,
        conv: ModuleFactory,
        norm: ModuleFactory,
        dilation: tuple[int, int] = (1, 1),
    ) -> tuple[jax.Array | None, jax.Array | float | None]:
        """Carries the block's input to the addition.

        Args:
          x: (n, h, w, c), the block's input.
          features: channels of the block's output.
          strides: stride from x to the block's output.
          conv: the block's factory of convolutions.
          norm: the block's factory of normalisations.
          dilation: see ``ResidualBlock``.

        Returns:
          The array that is added to F(x), (n, ceil(h / strides), ceil(w / strides),
          features), and a factor of F(x). None adds or multiplies nothing.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ZeroPad:
    """Option A: the identity; where the shape changes, subsampled and zero-padded."""

    def __call__(self, x, features, strides, conv, norm, dilation=(1, 1)):
        """See ``Shortcut``; raises ValueError if channels would become fewer."""
        return zero_pad(x, features, strides), None


@dataclasses.dataclass(frozen=True)
class Projection:
    """Options B and C: a 1x1 convolution and a normalisation, W_s x of equation 2.

    Option C is also the "1x1 convolutional shortcut" of He et al. 2016.

    Attributes:
      everywhere: False is option B, a projection where the shape changes and the
        identity elsewhere. True is option C, a projection in every block.
      normalized: False omits the normalisation, as pre-activation nets do.
      pooled: average 2x2 pixels where the map is halved and project with stride 1, so
        that no pixel is skipped (ResNet-D, He et al. 2019).
    """

    everywhere: bool = False
    normalized: bool = True
    pooled: bool = False

    def __call__(self, x, features, strides, conv, norm, dilation=(1, 1)):
        """See ``Shortcut``."""
        # By stride and width, not by shape: parameters must not depend on image sizes.
        unchanged = strides == 1 and x.shape[-1] == features
        if unchanged and not self.everywhere:
            return x, None
        if self.pooled:
            window = strides * dilation[1] // dilation[0]
            options = {"window": window, "strides": strides, "dilation": dilation[0]}
            x, strides = Pool(functools.partial(average_pool, **options))(x), 1
        x = conv(features, (1, 1), strides=strides, name="shortcut_conv")(x)
        return norm(name="shortcut_norm")(x) if self.normalized else x, None


@dataclasses.dataclass(frozen=True)
class NoShortcut:
    """The plain nets: adds nothing."""

    def __call__(self, x, features, strides, conv, norm, dilation=(1, 1)):
        """See ``Shortcut``."""
        return None, None


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Constant scaling (He et al. 2016, section 3.1): both paths times a constant.

    Where the shape changes it scales option A.

    Attributes:
      shortcut: factor of the shortcut, lambda in equation 6.
      residual: factor of F(x).
    """

    shortcut: float = 0.5
    residual: float = 1.0

    def __call__(self, x, features, strides, conv, norm, dilation=(1, 1)):
        """See ``Shortcut``."""
        return self.shortcut * zero_pad(x, features, strides), self.residual


@dataclasses.dataclass(frozen=True)
class Gated:
    """Gating (He et al. 2016, section 3.1) by g(x) = sigmoid(W_g x + b_g).

    The shortcut is multiplied by 1 - g(x). An exclusive gate also multiplies F(x) by
    g(x), as highway layers do. W_g is a 1x1 convolution of the block's input, without
    normalisation. The paper does not describe gates where the shape changes: here W_g
    has the block's stride and output channels, and the gated shortcut is option A.

    Attributes:
      exclusive: whether F(x) is gated too.
      bias: initial value of b_g. The paper tries 0 and -1 to -10; -6 is best for both
        kinds of gate.
    """

    exclusive: bool
    bias: float = -6.0

    def __call__(self, x, features, strides, conv, norm, dilation=(1, 1)):
        """See ``Shortcut``."""
        bias = {"use_bias": True, "bias_init": nn.initializers.constant(self.bias)}
        logits = conv(features, (1, 1), strides=strides, name="shortcut_gate", **bias)
        gate = nn.sigmoid(logits(x))
        carried = (1 - gate) * zero_pad(x, features, strides)
        return carried, gate if self.exclusive else None


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Dropout on the output of the shortcut (He et al. 2016, section 3.1).

    Where the shape changes it drops option A. Kept elements are divided by 1 -
    ``rate``, so the shortcut keeps its expectation; the paper seems not to divide.

    Attributes:
      rate: fraction of the elements that become zero.
      train: False drops nothing; the net sets it.
    """

    rate: float = 0.5
    train: bool = False

    def __call__(self, x, features, strides, conv, norm, dilation=(1, 1)):
        """See ``Shortcut``; draws from the rng "dropout"."""
        still, name = not self.train, "shortcut_dropout"
        drop = nn.Dropout(self.rate, deterministic=still, name=name)
        return drop(zero_pad(x, features, strides)), None


def zero_pad(x: jax.Array, features: int, strides: int) -> jax.Array:
    """Every ``strides``-th pixel of ``x``, with zero channels appended.

    (n, h, w, c) to (n, ceil(h / strides), ceil(w / strides), features).

    Raises:
      ValueError: ``features`` is below c.
    """
    extra = features - x.shape[-1]
    if extra < 0:
        raise ValueError(
            f"shortcut A cannot go from {x.shape[-1]} to {features} channels: it only "
            "appends zero channels; use a projection (B or C)"
        )
    if strides > 1:
        x = x[:, ::strides, ::strides, :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra))) if extra else x


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
