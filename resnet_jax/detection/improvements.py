"""The paper's improvements at test time (appendix B), as pure functions.

``refine`` and ``average`` act on a *classifier of regions*: a function from boxes
(..., R, 4) to class probabilities (..., R, K + 1), background last, and to regressed
boxes (..., R, K, 4). So they combine: ``refine(average([first, second]), ...)`` refines
an ensemble. The other functions take one image. Global context, the remaining
improvement, is trained, and a field of the net.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from resnet_jax.detection.boxes import area, iou
from resnet_jax.detection.nms import nms

Classifier = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def refine(
    classify: Classifier, proposals: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Box refinement: classifies the proposals, then the boxes regressed from them.

    The box that a proposal is regressed to is that of its most probable class. NMS at
    0.3 over the union of both passes and ``vote`` complete the paper's refinement.

    Args:
      classify: a classifier of regions.
      proposals: float32 (..., R, 4).
      valid: bool (..., R).

    Returns:
      Probabilities (..., 2R, K + 1), boxes (..., 2R, K, 4) and valid (..., 2R): the
      first pass, then the second.
    """
    probabilities, boxes = classify(proposals)
    best = probabilities[..., :-1].argmax(axis=-1)[..., None, None]
    regressed = jnp.take_along_axis(boxes, best, axis=-2)[..., 0, :]
    again = classify(regressed)
    return (
        jnp.concatenate([probabilities, again[0]], axis=-2),
        jnp.concatenate([boxes, again[1]], axis=-3),
        jnp.concatenate([valid, valid], axis=-1),
    )


def vote(
    kept: jax.Array,
    kept_classes: jax.Array,
    boxes: jax.Array,
    scores: jax.Array,
    classes: jax.Array,
    valid: jax.Array,
    threshold: float = 0.5,
) -> jax.Array:
    """Box voting: moves what NMS kept to the mean of the boxes around it.

    The mean is over the boxes of the same class whose IoU with the kept box is at least
    ``threshold``, weighted by their scores. A kept box stays if there is none, such as
    a box without area. Scores do not change.

    Source: Gidaris & Komodakis 2015, equation 5.

    Args:
      kept: float32 (S, 4), what NMS kept.
      kept_classes: int32 (S,).
      boxes: float32 (N, 4), what NMS was given, the kept boxes included.
      scores: float32 (N,), not negative.
      classes: int32 (N,).
      valid: bool (N,).
      threshold: the least IoU of a vote.

    Returns:
      float32 (S, 4).
    """
    near = (iou(kept, boxes) >= threshold) & (kept_classes[:, None] == classes) & valid
    weights = jnp.where(near, scores, 0)
    total = weights.sum(axis=1, keepdims=True)
    moved = jnp.einsum("sn,nc->sc", weights, boxes, precision="highest")
    return jnp.where(total > 0, moved / jnp.where(total > 0, total, 1), kept)


def choose_scales(
    boxes: jax.Array, size: jax.Array, sizes: jax.Array, pixels: float = 224**2
) -> jax.Array:
    """The two adjacent scales of an image pyramid at which each region is classified.

    One is the scale at which the region's area is nearest to ``pixels``, the other is
    the neighbour that is nearer to it; among equals, the smaller scale.

    Source: He et al. 2014 (SPP-net) for the nearest, Ren et al. 2015 (Object detection
    networks on convolutional feature maps) for the pair.

    Args:
      boxes: float32 (R, 4) on the image at one scale.
      size: (2,), height and width of that image.
      sizes: (S, 2), of the image at the scales of the pyramid, from small to large.
      pixels: the area at which the net was trained to classify.

    Returns:
      int32 (R, 2), the lower of the two indices first; twice 0 if S is 1.
    """
    factors = jnp.prod(sizes / size, axis=1)
    distances = jnp.abs(area(boxes)[:, None] * factors - pixels)
    nearest = distances.argmin(axis=1)
    last = len(sizes) - 1
    below, above = jnp.maximum(nearest - 1, 0), jnp.minimum(nearest + 1, last)
    rows = jnp.arange(len(boxes))
    rises = distances[rows, above] < distances[rows, below]
    goes_up = (nearest == 0) | ((nearest < last) & rises)
    lower = jnp.where(goes_up, nearest, below)
    return jnp.stack([lower, jnp.where(goes_up, above, nearest)], 1).astype(jnp.int32)


def take_scales(
    regions: Sequence[jax.Array], chosen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What two scales have of each region; the net merges its features by maximum.

    Args:
      regions: S arrays (..., R, h, w, c) of pooled regions, one for each scale.
      chosen: int32 (..., R, 2), from ``choose_scales``.

    Returns:
      Two arrays (..., R, h, w, c).
    """

    def take(index: jax.Array) -> jax.Array:
        index = index[..., None, None, None]
        result = regions[0]
        for scale, values in enumerate(regions[1:], start=1):
            result = jnp.where(index == scale, values, result)
        return result

    return take(chosen[..., 0]), take(chosen[..., 1])


def rescale(boxes: jax.Array, size: jax.Array, new_size: jax.Array) -> jax.Array:
    """Boxes (..., 4) of an image of one size (2,), on the image of another (2,)."""
    factors = (new_size / size)[::-1].astype(boxes.dtype)
    return boxes * jnp.concatenate([factors, factors])


def union(
    proposals: Sequence[jax.Array], valid: Sequence[jax.Array], threshold: float = 0.7
) -> tuple[jax.Array, jax.Array]:
    """The proposals of several detectors, without those that repeat another.

    NMS ranks them by their place in their own detector's list, because the scores of
    detectors that were trained apart do not compare; among equals, the earlier
    detector's comes first.

    Args:
      proposals: arrays (P, 4), each by falling score, on the same image.
      valid: bool (P,) each.
      threshold: IoU above which NMS drops the lower-ranked box.

    Returns:
      float32 (n P, 4) and bool (n P,), what was kept first.
    """
    ranks = jnp.concatenate([jnp.arange(len(each)) for each in proposals])
    boxes, exist = jnp.concatenate(proposals), jnp.concatenate(valid)
    scores = -ranks.astype(jnp.float32)
    indices, kept = nms(boxes, scores, exist, threshold, len(boxes))
    return boxes[indices], kept


def average(classifiers: Sequence[Classifier]) -> Classifier:
    """The classifier of regions with the mean of several's probabilities and boxes."""

    def classify(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs = [each(boxes) for each in classifiers]
        probabilities, regressed = zip(*outputs, strict=True)
        return jnp.stack(probabilities).mean(0), jnp.stack(regressed).mean(0)

    return classify
