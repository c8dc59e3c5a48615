"""Greedy non-maximum suppression, exact and with static shapes."""

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.detection.boxes import iou

# Boxes that are decided together. A block costs one pass over the boxes kept so far,
# and one over its own pairs for each link of its longest chain of overlaps.
_BLOCK = 512


def nms(
    boxes: jax.Array,
    scores: jax.Array,
    valid: jax.Array,
    threshold: float,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """The boxes that greedy non-maximum suppression keeps.

    By falling score, a box is kept if its IoU with each box kept before is at most
    ``threshold``. Equal scores count in the order of their indices.

    Args:
      boxes: (N, 4).
      scores: (N,).
      valid: bool (N,); other boxes are neither kept nor do they suppress.
      threshold: the largest IoU of two kept boxes.
      size: the number of boxes returned at most.

    Returns:
      indices: int32 (size,), by falling score; 0 where fewer boxes are left.
      valid: bool (size,), which of ``indices`` are boxes.
    """
    same = jnp.zeros(scores.shape, jnp.int32)
    return nms_by_class(boxes, scores, same, valid, threshold, size)


def nms_by_class(
    boxes: jax.Array,
    scores: jax.Array,
    classes: jax.Array,
    valid: jax.Array,
    threshold: float,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """``nms`` in which only boxes of one class suppress each other.

    The boxes of all classes share the ``size`` places. ``classes`` is int32 (N,).
    """
    order = jnp.lexsort((-scores, ~valid))
    block = min(_BLOCK, order.size)
    # The last block is filled with places past the end, which count as invalid.
    places = jnp.arange(-(-order.size // block) * block, dtype=jnp.int32)
    order = order.at[places].get(mode="fill", fill_value=0)
    boxes, classes, valid = (jnp.asarray(x)[order] for x in (boxes, classes, valid))
    valid = valid & (places < scores.size)

    def overlap(earlier, later):
        """Bool (E, L): which earlier places would suppress which later ones."""
        near = iou(boxes[earlier], boxes[later]) > threshold
        return near & (classes[earlier][:, None] == classes[later])

    def decide(state):
        start, kept, count = state
        here = start + jnp.arange(block, dtype=jnp.int32)
        known = (jnp.arange(size) < count)[:, None]
        free = valid[here] & ~jnp.any(overlap(kept, here) & known, 0)
        keep = _greedy(free, overlap(here, here))
        places = count + jnp.cumsum(keep, dtype=jnp.int32) - 1
        slots = jnp.where(keep, places, size)
        kept = kept.at[slots].set(here, mode="drop")
        return start + block, kept, jnp.minimum(count + keep.sum(dtype=jnp.int32), size)

    def undecided(state):
        start, _, count = state
        return (start < valid.sum()) & (count < size)

    zero = jnp.zeros((), jnp.int32)
    start = zero, jnp.zeros(size, jnp.int32), zero
    _, kept, count = lax.while_loop(undecided, decide, start)
    found = jnp.arange(size) < count
    return jnp.where(found, order[kept], 0).astype(jnp.int32), found


def _greedy(free: jax.Array, overlap: jax.Array) -> jax.Array:
    """Which of the n free places stay when earlier ones that stay suppress later ones.

    The answer is the only fixed point of keep = free & ~any(keep[:, None] & overlap)
    over pairs of an earlier and a later place. From any start, a place is final one
    step after all earlier ones that overlap it are. So the steps until nothing changes
    are one more than the longest chain of overlaps: a few in practice, n at most.
    """
    overlap = jnp.triu(overlap, 1)

    def step(state):
        keep, _ = state
        following = free & ~jnp.any(keep[:, None] & overlap, 0)
        return following, jnp.any(following != keep)

    return lax.while_loop(lambda state: state[1], step, (free, jnp.any(free)))[0]
