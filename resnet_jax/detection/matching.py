"""Which ground-truth box an anchor or proposal belongs to."""

import jax
import jax.numpy as jnp
from jax import lax


def match(
    iou: jax.Array,
    present: jax.Array,
    low: float,
    high: float,
    force_best: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Labels the N anchors of an image by their overlap with its boxes.

    Args:
      iou: (G, N), of ground-truth boxes with anchors; G is at least 1.
      present: bool (G,), which boxes exist.
      low: an anchor whose best IoU is below is negative.
      high: an anchor whose best IoU reaches this is positive.
      force_best: also label positive, for each present box, the anchors of its highest
        IoU, all of a tie, if they touch it (Ren et al. 2015, section 3.1.2). They
        belong to their own best box, which may be another, as in py-faster-rcnn.

    Returns:
      labels: int32 (N,): 1 positive, 0 negative, -1 in between, which is ignored.
      index: int32 (N,), the box of the highest IoU, the first of a tie. 0 if no box is
        present; all labels are 0 then.
    """
    # Without the barrier, XLA may compute an IoU twice and round it in two ways; then
    # the highest one would not equal itself.
    iou = lax.optimization_barrier(jnp.where(present[:, None], iou, -1))
    best = iou.max(0)
    labels = jnp.where(best >= high, 1, jnp.where(best < low, 0, -1))
    if force_best:
        highest = iou.max(1, keepdims=True)
        forced = jnp.any((iou == highest) & (highest > 0), 0)
        labels = jnp.where(forced, 1, labels)
    return labels.astype(jnp.int32), iou.argmax(0).astype(jnp.int32)
