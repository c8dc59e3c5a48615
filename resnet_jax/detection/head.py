"""The Fast R-CNN head: class logits and boxes of regions (Girshick 2015)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.config.detection import DetectorConfig
from resnet_jax.detection.boxes import clip, decode
from resnet_jax.detection.nms import nms
from resnet_jax.models.conv import INITIALIZATIONS
from resnet_jax.models.fused import widen

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Factors of a region's deltas: the inverse of their deviations in Fast R-CNN."""


class Head(nn.Module):
    """Sibling layers for classes and boxes.

    Attributes:
      num_classes: K, without the background.
      class_agnostic: one box for all classes.
    """

    num_classes: int
    class_agnostic: bool = False

    @nn.compact
    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits (..., K + 1), background last, and deltas (..., K, 4), float32.

        A class-agnostic head has deltas (..., 1, 4).
        """
        features = widen(features)
        boxes = 1 if self.class_agnostic else self.num_classes
        dense = functools.partial(nn.Dense, kernel_init=INITIALIZATIONS["normal_0.01"])
        logits = dense(self.num_classes + 1, name="classes")(features)
        deltas = dense(4 * boxes, name="boxes")(features)
        return logits, deltas.reshape(*features.shape[:-1], boxes, 4)


class Detected(NamedTuple):
    """Detections of one image, best first.

    Attributes:
      boxes: float32 (D, 4).
      scores: float32 (D,), probabilities.
      classes: int32 (D,).
      valid: bool (D,); the others fill up.
    """

    boxes: jax.Array
    scores: jax.Array
    classes: jax.Array
    valid: jax.Array


def decode_regions(
    deltas: jax.Array, boxes: jax.Array, size: jax.Array, num_classes: int
) -> jax.Array:
    """The boxes of every class: deltas (R, K or 1, 4) on (R, 4) to (R, K, 4)."""
    decoded = decode(deltas, boxes[:, None], DELTA_WEIGHTS)
    decoded = clip(decoded, size)
    return jnp.broadcast_to(decoded, (len(boxes), num_classes, 4))


def detect(
    probabilities: jax.Array,
    boxes: jax.Array,
    valid: jax.Array,
    config: DetectorConfig,
) -> Detected:
    """The detections of one image: a threshold, NMS in each class, the best of all.

    Args:
      probabilities: float32 (R, K + 1), background last.
      boxes: float32 (R, K, 4), decoded for each class.
      valid: bool (R,).
      config: of the detector.
    """
    scores = probabilities[:, :-1]
    wanted = valid[:, None] & (scores > config.score_threshold)
    # No class has more detections than the image.
    most = min(config.detections, len(scores))
    kept, found = jax.vmap(
        lambda boxes, scores, valid: nms(boxes, scores, valid, config.nms, most),
        in_axes=1,
    )(boxes, scores, wanted)
    num_classes = scores.shape[1]
    classes = jnp.arange(num_classes, dtype=jnp.int32)[:, None]
    every = jnp.where(found, scores.T[classes, kept], -1.0).reshape(-1)
    top, best = jax.lax.top_k(every, min(config.detections, every.size))
    region, of_class = kept.reshape(-1)[best], (best // most).astype(jnp.int32)
    return Detected(boxes[region, of_class], top, of_class, top > 0)
