"""Rare parts of blocks that are wrapped around a residual function or its layers."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.conv import he_normal
from resnet_jax.models.factories import ModuleFactory
from resnet_jax.models.fused import widen
from resnet_jax.models.pooling import Pool, global_average


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all channel means (Hu et al. 2018).

    Attributes:
      ratio: hidden channels as a fraction of the input channels.
      divisor: the hidden channels are a positive multiple of it. timm's nets use 8,
        the paper 1.
    """

    ratio: float = 1 / 16
    divisor: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) to the same shape."""
        channels = x.shape[-1]
        rounded = int(channels * self.ratio + self.divisor / 2) // self.divisor
        hidden = max(rounded, 1) * self.divisor
        gate = Pool(global_average)(x)[:, None, None].astype(x.dtype)
        dense = nn.Dense(hidden, dtype=x.dtype, kernel_init=he_normal, name="reduce")
        gate = nn.relu(dense(gate))
        gate = nn.Dense(channels, dtype=x.dtype, name="expand")(gate)
        return x * nn.sigmoid(gate)


class StochasticDepth(nn.Module):
    """Drops a residual function in training (Huang et al. 2016).

    Kept values are divided by the probability of being kept, so evaluation needs no
    factor. Draws from the rng "dropout".

    Attributes:
      deterministic: True keeps everything, for evaluation.
      per_example: drop each example independently, as torchvision and timm do. False
        drops the whole batch at once, as the paper does.
    """

    deterministic: bool
    per_example: bool = True

    @nn.compact
    def __call__(self, y: jax.Array, rate: float | jax.Array) -> jax.Array:
        """``y`` (n, ...), with each example set to zero with probability ``rate``."""
        if self.deterministic or (isinstance(rate, float) and rate == 0):
            return y
        # In float32: bfloat16 has no number between 0.996 and 1.
        wide = widen(y)
        keep = 1 - jnp.asarray(rate, wide.dtype)
        examples = y.shape[0] if self.per_example else 1
        shape = (examples,) + (1,) * (y.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
        return jnp.where(kept, (wide / keep).astype(y.dtype), jnp.zeros_like(y))


def linear_rates(last: float, count: int) -> tuple[float, ...]:
    """Rates that grow linearly with depth: block l of L drops with last * l / L."""
    return tuple(last * (index + 1) / count for index in range(count))


def dropout_between(conv: ModuleFactory, dropout: ModuleFactory) -> ModuleFactory:
    """A convolution factory for blocks with dropout between their convolutions.

    As in wide nets (Zagoruyko & Komodakis 2016), ``dropout()`` acts on the input of
    ``conv2``, ``conv3``, ... Shortcuts have none.
    """

    def make(*args: Any, name: str, **options: Any) -> Any:
        layer = conv(*args, name=name, **options)
        if re.fullmatch(r"conv(\d+)", name) and name != "conv1":
            return lambda x: layer(dropout()(x))
        return layer

    return make
