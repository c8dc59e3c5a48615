"""Metrics as sums and counts, so that means over any batches are exact."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

TOP5_CLASSES = 100
"""With at least this many classes the top-5 error is reported too."""


@flax.struct.dataclass
class Sums:
    """Sums over examples: float32 losses, and int32 counts."""

    loss: jax.Array
    errors: jax.Array  # the largest logit is not the label's
    top5_errors: jax.Array  # the label's logit is not among the five largest
    count: jax.Array

    @classmethod
    def zeros(cls) -> "Sums":
        """The sums over no examples."""
        # Separate arrays: a donated state must not hold a buffer twice.
        return cls(jnp.zeros(()), *(jnp.zeros((), jnp.int32) for _ in range(3)))

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)

    def summary(self) -> dict[str, Any]:
        """Means and counts as Python numbers: loss, error, top5_error, errors, count.

        Waits for the devices.
        """
        sums = jax.device_get(self)
        count = int(sums.count)
        return {
            "loss": float(sums.loss) / count,
            "error": int(sums.errors) / count,
            "top5_error": int(sums.top5_errors) / count,
            "errors": int(sums.errors),
            "count": count,
        }


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy of each example, float32 (n,)."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels
    )


def batch_sums(
    logits: jax.Array, labels: jax.Array, losses: jax.Array, mask: jax.Array
) -> Sums:
    """Sums over a batch: logits (n, k), labels, losses and a 0/1 mask (n,).

    An example with mask 0 counts for nothing, whatever its values. A NaN logit is an
    error.
    """
    real = mask > 0
    wrong = jnp.argmax(logits, axis=-1) != labels
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # Not ">": every logit beats a NaN logit of the label.
    rank = jnp.sum(~(logits <= own), axis=-1)
    return Sums(
        loss=jnp.sum(jnp.where(real, losses, 0.0)),
        errors=jnp.sum(real & wrong, dtype=jnp.int32),
        top5_errors=jnp.sum(real & (rank >= 5), dtype=jnp.int32),
        count=jnp.sum(real, dtype=jnp.int32),
    )
