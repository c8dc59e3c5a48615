"""Squeeze-and-excitation (Hu et al. 2018)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.convolution import he_normal


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate computed from all channels' means.

    Attributes:
      ratio: channels of the hidden layer over those of the input.
      divisor: the hidden layer's channels are a multiple of it and never fewer; 8 as
        in timm's nets, 1 for the paper's own.
    """

    ratio: float = 1 / 16
    divisor: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) to the same."""
        channels = x.shape[-1]
        rounded = int(channels * self.ratio + self.divisor / 2) // self.divisor
        hidden = max(rounded, 1) * self.divisor
        # The mean in float32: the sum of a bfloat16 map loses its small terms.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        gate = x.mean(axis=(1, 2), keepdims=True, dtype=wide).astype(x.dtype)
        dense = nn.Dense(hidden, dtype=x.dtype, kernel_init=he_normal, name="reduce")
        gate = nn.relu(dense(gate))
        gate = nn.Dense(channels, dtype=x.dtype, name="expand")(gate)
        return x * nn.sigmoid(gate)
