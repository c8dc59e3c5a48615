"""The region proposal network (Ren et al. 2015) and the proposals it makes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from resnet_jax.detection.boxes import clip, decode
from resnet_jax.detection.nms import nms
from resnet_jax.models.conv import INITIALIZATIONS, Conv
from resnet_jax.models.fused import widen
from resnet_jax.models.pooling import inside

ANCHOR_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
"""Factors of the deltas of anchors."""

small_normal = INITIALIZATIONS["normal_0.01"]


class RPN(nn.Module):
    """A 3x3 convolution, then 1x1 ones for the objectness and box of each anchor.

    Attributes:
      per_cell: anchors of a cell of the map.
      features: channels of the 3x3 convolution.
      dtype: dtype of the 3x3 convolution.
    """

    per_cell: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, maps: jax.Array, map_sizes: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Objectness logits (B, N) and deltas (B, N, 4) of all anchors, float32.

        Args:
          maps: (B, h, w, c).
          map_sizes: int (B, 2), the part of each map that belongs to its image.
        """
        x = jnp.where(inside(maps, map_sizes), maps, 0)
        options: dict[str, Any] = {"use_bias": True, "kernel_init": small_normal}
        conv = Conv(self.features, (3, 3), dtype=self.dtype, name="conv", **options)
        x = widen(nn.relu(conv(x)))
        objectness = Conv(self.per_cell, (1, 1), name="objectness", **options)(x)
        deltas = Conv(4 * self.per_cell, (1, 1), name="deltas", **options)(x)
        count = len(maps)
        return objectness.reshape(count, -1), deltas.reshape(count, -1, 4)


class Proposals(NamedTuple):
    """Proposals of one image, best first.

    Attributes:
      boxes: float32 (P, 4).
      scores: float32 (P,), objectness logits.
      valid: bool (P,); the others fill up.
    """

    boxes: jax.Array
    scores: jax.Array
    valid: jax.Array


def propose(
    objectness: jax.Array,
    deltas: jax.Array,
    anchors: jax.Array,
    present: jax.Array,
    size: jax.Array,
    *,
    candidates: int,
    count: int,
    threshold: float,
    smallest: float,
) -> Proposals:
    """The best boxes of one image after non-maximum suppression.

    Args:
      objectness: float32 (N,).
      deltas: float32 (N, 4).
      anchors: float32 (N, 4).
      present: bool (N,), anchors of cells inside the image.
      size: int (2,), height and width of the image.
      candidates: best anchors that are decoded.
      count: proposals P.
      threshold: IoU above which a better box suppresses another.
      smallest: shortest side of a proposal.
    """
    objectness = jnp.where(present, objectness, -jnp.inf)
    scores, best = lax.top_k(objectness, min(candidates, len(objectness)))
    boxes = clip(decode(deltas[best], anchors[best], ANCHOR_WEIGHTS), size)
    sides = boxes[:, 2:] - boxes[:, :2]
    valid = jnp.isfinite(scores) & (sides >= smallest).all(-1)
    kept, valid = nms(boxes, scores, valid, threshold, count)
    return Proposals(boxes[kept], scores[kept], valid)
