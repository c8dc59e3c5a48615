"""Boxes: area, overlap, and the deltas by which one box becomes another.

A box is float32 (x1, y1, x2, y2) in continuous pixel coordinates, with the origin in
the image's top left corner: its width is x2 - x1, and a box over an h x w image is
(0, 0, w, h).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Larger deltas of width and height count as this one, by which 16 pixels become 1000.
MAX_LOG_SCALE = math.log(1000 / 16)

# Shorter sides count as this one in ``encode``, in pixels: no logarithm of zero.
_SHORTEST = 1e-3


def area(boxes: jax.Array) -> jax.Array:
    """Areas (...) of boxes (..., 4); 0 for a box whose corners are swapped."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of all pairs: (N, 4) and (M, 4) -> (N, M).

    It is 0 for a box without area.
    """
    intersection = _shared(a, b, 0) * _shared(a, b, 1)
    union = area(a)[:, None] + area(b)[None, :] - intersection
    return jnp.where(intersection > 0, intersection / jnp.maximum(union, 1e-12), 0)


def encode(boxes: jax.Array, anchors: jax.Array, weights: Sequence[float]) -> jax.Array:
    """The deltas that make boxes of anchors (Girshick et al. 2014, appendix C).

    Args:
      boxes: (..., 4), the targets.
      anchors: (..., 4), the boxes to start from.
      weights: the factors of dx, dy, dw and dh, so that the head regresses numbers near
        unit variance.

    Returns:
      (..., 4): the shift of the centre in anchor widths and heights, and the logarithms
      of the scales of width and height, each times its weight. Finite, also for a box
      or an anchor without area.
    """
    (centre, side), (anchor_centre, anchor_side) = _centred(boxes), _centred(anchors)
    side, anchor_side = (jnp.maximum(s, _SHORTEST) for s in (side, anchor_side))
    shift = (centre - anchor_centre) / anchor_side
    deltas = jnp.concatenate([shift, jnp.log(side / anchor_side)], -1)
    return deltas * jnp.asarray(weights, deltas.dtype)


def decode(
    deltas: jax.Array, anchors: jax.Array, weights: Sequence[float]
) -> jax.Array:
    """The boxes (..., 4) that deltas (..., 4) make of anchors: ``encode`` inverted.

    Deltas of width and height are cut at ``MAX_LOG_SCALE``, as elsewhere, so that the
    first steps of a training cannot overflow. The leading dimensions broadcast.
    """
    centre, side = _centred(anchors)
    deltas = deltas / jnp.asarray(weights, anchors.dtype)
    centre = centre + deltas[..., :2] * side
    side = jnp.exp(jnp.minimum(deltas[..., 2:], MAX_LOG_SCALE)) * side
    return jnp.concatenate([centre - side / 2, centre + side / 2], -1)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Boxes (..., 4) cut at the border of an image; ``size`` is its height, width."""
    height, width = size[0], size[1]
    most = jnp.stack([width, height, width, height]).astype(boxes.dtype)
    return jnp.clip(boxes, 0, most)


def _shared(a, b, axis):
    """The length (N, M) that all pairs share along x (axis 0) or y (axis 1)."""
    start = jnp.maximum(a[:, None, axis], b[None, :, axis])
    end = jnp.minimum(a[:, None, axis + 2], b[None, :, axis + 2])
    return jnp.maximum(end - start, 0)


def _centred(boxes):
    """Centres and sides, each (..., 2), x before y."""
    side = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + side / 2, side
