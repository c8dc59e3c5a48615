"""The random sample of anchors or RoIs that a training step learns from."""

import jax
import jax.numpy as jnp
from jax import lax


def sample(
    key: jax.Array,
    labels: jax.Array,
    size: int,
    fraction: float,
    places: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Up to ``size`` positives and negatives, uniformly at random (Girshick 2015).

    At most ``fraction * size`` are positive. Negatives fill the rest, also where there
    are fewer positives.

    Args:
      key: a random key.
      labels: int32 (N,): 1 positive, 0 negative, -1 never sampled.
      size: the number of slots.
      fraction: the largest share of positives, from 0 to 1.
      places: int32 (N,), the numbers of the entries, by default 0 to N - 1. An entry's
        random number depends on ``key`` and its place alone. So entries that are never
        sampled can be added anywhere without changing the sample, if places stay.

    Returns:
      indices: int32 (size,), without repetition, positives first; 0 in unused slots.
      labels: int32 (size,): 1, 0, or -1 for an unused slot.
    """
    if places is None:
        places = jnp.arange(labels.size)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
    numbers = jax.vmap(jax.random.bits)(keys)
    # Sorted positives, then sorted negatives, then the rest; the places break ties.
    groups = jnp.where(labels < 0, 2, 1 - labels)
    indices = jnp.arange(labels.size, dtype=jnp.int32)
    *_, order = lax.sort((groups, numbers, places, indices), num_keys=3)

    all_positives, all_negatives = jnp.sum(labels == 1), jnp.sum(labels == 0)
    positives = jnp.minimum(all_positives, int(fraction * size))
    negatives = jnp.minimum(all_negatives, size - positives)
    slots = jnp.arange(size)
    negative = slots - positives
    taken = jnp.where(slots < positives, slots, all_positives + negative)
    sampled = jnp.where(slots < positives, 1, jnp.where(negative < negatives, 0, -1))
    indices = jnp.where(sampled < 0, 0, order[jnp.where(sampled < 0, 0, taken)])
    return indices.astype(jnp.int32), sampled.astype(jnp.int32)
