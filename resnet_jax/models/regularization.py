"""What training leaves out at random: whole residual functions."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class StochasticDepth(nn.Module):
    """Drops a residual function in training (Huang et al. 2016).

    What is kept is divided by the probability of being kept, so that evaluation needs
    no factor. Draws from the rng "dropout".

    Attributes:
      deterministic: True keeps everything: evaluation.
      per_example: False drops for the whole batch at once, as the paper does; True
        for each example, as torchvision and timm do.
    """

    deterministic: bool
    per_example: bool = True

    @nn.compact
    def __call__(self, y: jax.Array, rate: float | jax.Array) -> jax.Array:
        """``y`` (n, ...) with examples set to zero with probability ``rate``."""
        if self.deterministic or (isinstance(rate, float) and rate == 0):
            return y
        # In float32: bfloat16 has no number between 0.996 and 1 and draws none there.
        keep = 1 - jnp.asarray(rate, jnp.promote_types(y.dtype, jnp.float32))
        examples = y.shape[0] if self.per_example else 1
        shape = (examples,) + (1,) * (y.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
        return jnp.where(kept, (y / keep).astype(y.dtype), jnp.zeros_like(y))


def linear_rates(last: float, count: int) -> tuple[float, ...]:
    """Rates that grow linearly with depth: block l of L drops with ``last`` l / L."""
    return tuple(last * (index + 1) / count for index in range(count))
