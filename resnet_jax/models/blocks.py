"""Building blocks: y = F(x, {W_i}) + shortcut(x), then ReLU (equations 1 and 2)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.normalization import ModuleFactory
from resnet_jax.models.shortcuts import Projection, Shortcut

STRIDE_VERSIONS = ("v1", "v1.5")

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He initialisation with the fan-out, as the authors' released code draws it."""


class Conv(nn.Module):
    """A convolution without bias, padded by hand: the same on every side.

    'SAME' would pad a 3x3 of stride 2 on one side only, which shifts the maps by a
    pixel against torch's and the original's. ``strides`` is a single number; the sides
    of ``kernel_size`` are odd.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) to (n, ceil(h / strides), ceil(w / strides), features)."""
        kernel = self.param(
            "kernel",
            he_normal,
            (*self.kernel_size, x.shape[-1], self.features),
            jnp.float32,
        )
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.strides, self.strides),
            padding=[(size // 2, size // 2) for size in self.kernel_size],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (Fig. 5 left).

    Attributes:
      features: channels of both convolutions and of the output.
      strides: stride of the first convolution and of the shortcut.
      norm: factory of the normalisations, ``norm(name=...)``.
      shortcut: what is added to the residual function.
      conv: factory of the convolutions.
      stride_version: has no meaning here; blocks share one interface.
    """

    features: int
    strides: int
    norm: ModuleFactory
    shortcut: Shortcut = Projection()
    conv: ModuleFactory = Conv
    stride_version: str = "v1.5"
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) to (n, ceil(h / strides), ceil(w / strides), features)."""
        y = self.conv(self.features, (3, 3), strides=self.strides, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.features, (3, 3), name="conv2")(y)
        y = self.norm(name="norm2")(y)
        added = self.shortcut(x, y, self.strides, self.conv, self.norm)
        return nn.relu(y if added is None else y + added)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the last is four times as wide (Fig. 5 right).

    Attributes:
      features: channels of the first two convolutions; the output has four times
        as many.
      strides: stride of the block and of the shortcut.
      norm: factory of the normalisations, ``norm(name=...)``.
      shortcut: what is added to the residual function.
      conv: factory of the convolutions.
      stride_version: "v1" strides the first 1x1, as the paper and its released
        models do; "v1.5" strides the 3x3, as torchvision does.
    """

    features: int
    strides: int
    norm: ModuleFactory
    shortcut: Shortcut = Projection()
    conv: ModuleFactory = Conv
    stride_version: str = "v1.5"
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) to (n, ceil(h / strides), ceil(w / strides), 4 features)."""
        if self.stride_version not in STRIDE_VERSIONS:
            raise ValueError(
                f"stride_version is one of {', '.join(STRIDE_VERSIONS)}, "
                f"not {self.stride_version!r}"
            )
        strides_first = self.stride_version == "v1"
        first, second = (self.strides, 1) if strides_first else (1, self.strides)
        y = self.conv(self.features, (1, 1), strides=first, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.features, (3, 3), strides=second, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.conv(self.features * self.expansion, (1, 1), name="conv3")(y)
        y = self.norm(name="norm3")(y)
        added = self.shortcut(x, y, self.strides, self.conv, self.norm)
        return nn.relu(y if added is None else y + added)
