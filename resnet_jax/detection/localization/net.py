"""The localisation net, its loss, and its best boxes: pure functions of arrays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from resnet_jax.detection.anchors import Anchors
from resnet_jax.detection.boxes import clip, decode, encode, iou
from resnet_jax.detection.matching import match
from resnet_jax.detection.sampling import sample
from resnet_jax.models.features import FeatureNet
from resnet_jax.models.masking import apply_masked, sizes_of_map

SAMPLED = 8
"""Anchors of an image that a step learns from, half of them positive."""

_LOW, _HIGH = 0.3, 0.7  # IoU: negatives below, positives from; as in Faster R-CNN
_WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of deltas


class LocalizationNet(nn.Module):
    """Scores and deltas of anchors, for every class, from the last map of a net.

    Attributes:
      backbone: a net without its classifier.
      num_classes: K.
      anchors_per_cell: A.
    """

    backbone: FeatureNet
    num_classes: int
    anchors_per_cell: int

    def setup(self) -> None:
        """A dense layer on each cell is a 1x1 convolution."""
        outputs = self.anchors_per_cell * self.num_classes
        small = nn.initializers.normal(0.01)
        self.cls = nn.Dense(outputs, kernel_init=small)
        self.reg = nn.Dense(4 * outputs, kernel_init=small)

    def features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The last map (n, h, w, c), float32, of normalised images."""
        return self.backbone.features(images, train)[-1].array.astype(jnp.float32)

    def scores(self, cells: jax.Array) -> jax.Array:
        """Logits (..., A, K) of cells (..., c): does the anchor show the class?"""
        shape = (*cells.shape[:-1], self.anchors_per_cell, self.num_classes)
        return self.cls(cells).reshape(shape)

    def deltas(self, cells: jax.Array) -> jax.Array:
        """Deltas (..., A, K, 4) of cells (..., c), from each anchor to each class."""
        shape = (*cells.shape[:-1], self.anchors_per_cell, self.num_classes, 4)
        return self.reg(cells).reshape(shape)

    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Scores (n, h, w, A, K) and deltas (n, h, w, A, K, 4)."""
        cells = self.features(images, train)
        return self.scores(cells), self.deltas(cells)


def localization_loss(
    net: LocalizationNet,
    anchors: Anchors,
    variables: Any,
    key: jax.Array,
    images: jax.Array,
    boxes: jax.Array,
    present: jax.Array,
    classes: jax.Array,
) -> jax.Array:
    """Logistic loss plus smooth L1 loss of positives, mean over the sampled anchors.

    Each image trains the outputs of its own class alone, on 8 anchors at 1:1: if it
    trained all 1000 sigmoids, negatives would dominate after all.

    Args:
      net: the module.
      anchors: of its map.
      variables: its params and batch_stats.
      key: of the samples.
      images: (B, h, w, channels), normalised.
      boxes: float32 (B, G, 4).
      present: bool (B, G).
      classes: int32 (B,).
    """
    cells: Any = net.apply(variables, images, method="features")
    grid = jnp.asarray(anchors.grid(*cells.shape[1:3]))
    keys = jax.random.split(key, len(images))
    sampled = jax.vmap(functools.partial(_sample, grid))(keys, boxes, present)
    chosen, labels, targets = sampled
    cell, kind = jnp.divmod(chosen, anchors.per_cell)
    flat = cells.reshape(len(images), -1, cells.shape[-1])
    seen = jnp.take_along_axis(flat, cell[..., None], axis=1)
    scores: Any = net.apply(variables, seen, method="scores")
    deltas: Any = net.apply(variables, seen, method="deltas")
    image, slot = jnp.indices(chosen.shape)
    own = (image, slot, kind, classes[:, None])
    positive = labels == 1
    classified = optax.sigmoid_binary_cross_entropy(scores[own], positive)
    regressed = optax.huber_loss(deltas[own], targets).sum(-1)
    losses = jnp.where(positive, classified + regressed, classified)
    used = labels >= 0
    return jnp.where(used, losses, 0).sum() / jnp.maximum(used.sum(), 1)


def _sample(anchors, key, boxes, present):
    """Of one image: indices (8,), labels (8,) and target deltas (8, 4) of anchors."""
    overlaps = iou(boxes, anchors)
    labels, index = match(overlaps, present, _LOW, _HIGH, force_best=True)
    chosen, labels = sample(key, labels, SAMPLED, 0.5)
    return chosen, labels, encode(boxes[index[chosen]], anchors[chosen], _WEIGHTS)


def best_boxes(
    net: LocalizationNet,
    anchors: Anchors,
    variables: Any,
    images: jax.Array,
    sizes: jax.Array,
    classes: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The box of the highest score of each class, fully convolutionally.

    Args:
      net: the module.
      anchors: of its map.
      variables: its params and batch_stats.
      images: (B, h, w, channels), normalised; h and w are multiples of the stride.
      sizes: int32 (B, 2), height and width of each image in its top left corner; what
        is outside has no effect.
      classes: int32 (B, k), those asked for.

    Returns:
      Boxes float32 (B, k, 4), cut at the image's border, and their logits (B, k).
    """
    cells = apply_masked(net, variables, images, sizes, method="features")
    b, h, w, c = cells.shape
    scores: Any = net.apply(variables, cells, method="scores")
    asked = jnp.take_along_axis(scores, classes[:, None, None, None], axis=-1)
    of_map = sizes_of_map(sizes, anchors.stride)
    row, column = jnp.indices((h, w))
    inside = (row < of_map[:, 0, None, None]) & (column < of_map[:, 1, None, None])
    asked = jnp.where(inside[..., None, None], asked, -jnp.inf)
    asked = asked.reshape(b, -1, classes.shape[1])
    best = asked.argmax(axis=1)
    cell, kind = jnp.divmod(best, anchors.per_cell)
    seen = jnp.take_along_axis(cells.reshape(b, h * w, c), cell[..., None], axis=1)
    deltas: Any = net.apply(variables, seen, method="deltas")
    image, slot = jnp.indices(best.shape)
    grid = jnp.asarray(anchors.grid(h, w))
    boxes = decode(deltas[image, slot, kind, classes], grid[best], _WEIGHTS)
    return jax.vmap(clip)(boxes, sizes), asked.max(axis=1)
