"""Faster R-CNN on one map of a residual net (section 4.3; Ren et al. 2015).

An image passes the trunk once. The RPN proposes boxes on its map; the tail, the net's
last stage, and the head look at each of them. Every shape is static: images are padded
to the sizes of buckets, and nothing of an image depends on its padding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from resnet_jax.config import DetectionConfig
from resnet_jax.config.detection import DetectorConfig
from resnet_jax.data.transforms import PixelStatistics, normalize, to_unit
from resnet_jax.detection.anchors import Anchors
from resnet_jax.detection.backbone import STRIDE, Backbone, make_backbone
from resnet_jax.detection.head import Head
from resnet_jax.detection.roi import roi_align, roi_pool
from resnet_jax.detection.rpn import RPN, Proposals, propose
from resnet_jax.models.features import checked_images
from resnet_jax.models.masking import masked
from resnet_jax.models.pooling import inside
from resnet_jax.models.resnet import ResNet


class FasterRCNN(nn.Module):
    """The net's three parts, each a method: ``features``, ``rpn_of`` and ``classify``.

    Its variables are those of the classification net without its head, by the same
    names, and ``rpn`` and ``head``.

    Attributes:
      backbone: the net, cut in two.
      num_classes: K, without the background.
      config: of the detector.
      anchors: of a cell.
    """

    backbone: Backbone
    num_classes: int
    config: DetectorConfig
    anchors: Anchors

    def setup(self) -> None:
        """Builds the parts, in one scope."""
        # Copies, as a module belongs to one parent.
        self.trunk, self.tail = self.backbone.trunk.clone(), self.backbone.tail.clone()
        nn.share_scope(self, self.trunk)
        nn.share_scope(self, self.tail)
        dtype = self.backbone.net.dtype
        self.rpn = RPN(self.anchors.per_cell, self.config.rpn_features, dtype)
        self.head = Head(self.num_classes, self.config.class_agnostic)

    def features(
        self, images: jax.Array, sizes: jax.Array, train: bool = False
    ) -> jax.Array:
        """The trunk's map (B, H / 16, W / 16, c), zero outside each image.

        Args:
          images: (B, H, W, 3), normalised and padded to multiples of 16.
          sizes: int (B, 2), height and width of each image.
          train: normalise by batch statistics that are not frozen; these see the
            padding.
        """
        images = checked_images(images)
        with masked(images.shape[1:3], sizes):
            maps = self.trunk.features(images, train)[-1].array
        return jnp.where(inside(maps, self.map_sizes(sizes)), maps, 0)

    def map_sizes(self, sizes: jax.Array) -> jax.Array:
        """The part of the map that belongs to each image, int (B, 2)."""
        return self.backbone.sizes_of_map(sizes)

    def rpn_of(self, maps: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Objectness (B, N) and deltas (B, N, 4) of all anchors of a map."""
        return self.rpn(maps, self.map_sizes(sizes))

    def classify(
        self,
        maps: jax.Array,
        boxes: jax.Array,
        sizes: jax.Array,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Class logits (B, R, K + 1), background last, and deltas (B, R, K, 4).

        Args:
          maps: of ``features``.
          boxes: float32 (B, R, 4), regions of each image; no gradient passes them.
          sizes: int (B, 2), of the images.
          train: as in ``features``.
        """
        return self.head(self.region_features(maps, boxes, sizes, train))

    def region_features(
        self, maps: jax.Array, boxes: jax.Array, sizes: jax.Array, train: bool = False
    ) -> jax.Array:
        """The tail's features of each region, (B, R, d).

        With ``context``, those of the whole image follow each region's: (B, R, 2 d).
        """
        boxes = self.all_regions(lax.stop_gradient(boxes), sizes)
        regions = self.pool(maps, boxes, sizes)
        return self.joined(self.tail_features(regions, train))

    def all_regions(self, boxes: jax.Array, sizes: jax.Array) -> jax.Array:
        """The boxes to pool: (B, R, 4), and the whole image last with ``context``."""
        if self.config.context:
            boxes = jnp.concatenate([boxes, whole_images(sizes)], axis=1)
        return boxes

    def pool(self, maps: jax.Array, boxes: jax.Array, sizes: jax.Array) -> jax.Array:
        """Pooled regions (B, R, out, out, c) of boxes (B, R, 4)."""
        function: Any = {
            "align": roi_align,
            "align_v1": functools.partial(roi_align, aligned=False),
            "max": roi_pool,
        }[self.config.roi_pooling]
        out = self.config.roi_size or self.backbone.roi_size
        pool = functools.partial(function, stride=STRIDE, out=out)
        return jax.vmap(pool)(maps, boxes, self.map_sizes(sizes))

    def tail_features(self, regions: jax.Array, train: bool = False) -> jax.Array:
        """The tail's features (B, R, d) of pooled regions."""
        features = self.tail(regions.reshape(-1, *regions.shape[2:]), train)
        return features.reshape(*regions.shape[:2], -1)

    def joined(self, features: jax.Array) -> jax.Array:
        """Features for the head: with ``context``, the last region's beside the others.

        Without, they stay as they are.
        """
        if self.config.context:
            features, context = features[:, :-1], features[:, -1:]
            context = jnp.broadcast_to(context, features.shape)
            features = jnp.concatenate([features, context], axis=-1)
        return features

    def __call__(
        self, images: jax.Array, sizes: jax.Array, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Passes all parts, for ``init``: logits and deltas of whole images."""
        maps = self.features(images, sizes, train)
        self.rpn_of(maps, sizes)
        return self.classify(maps, whole_images(sizes), sizes, train)

    @property
    def tail_parts(self) -> tuple[str, ...]:
        """The names of the tail's parts."""
        return ("stage4",) if isinstance(self.backbone.tail, ResNet) else ("fc1", "fc2")

    def present(self, maps: jax.Array, sizes: jax.Array) -> jax.Array:
        """Which anchors of a map belong to cells of each image: bool (B, N)."""
        cells = inside(maps, self.map_sizes(sizes)).reshape(len(maps), -1)
        return jnp.repeat(cells, self.anchors.per_cell, axis=1)


def whole_images(sizes: jax.Array) -> jax.Array:
    """A box over each image: sizes (B, 2) to float32 (B, 1, 4)."""
    corners = sizes[:, None, ::-1].astype(jnp.float32)
    return jnp.concatenate([jnp.zeros_like(corners), corners], axis=-1)


def make_detector(config: DetectionConfig, num_classes: int) -> FasterRCNN:
    """The net of a config.

    Raises:
      UserError: its backbone does not fit.
    """
    detector = config.detector
    return FasterRCNN(
        backbone=make_backbone(config.model),
        num_classes=num_classes,
        config=detector,
        anchors=Anchors(
            sizes=detector.anchor_sizes,
            ratios=detector.anchor_ratios,
            stride=STRIDE,
            rounded=detector.anchor_rounding,
            order=detector.anchor_order,
        ),
    )


def propose_from(
    config: DetectorConfig,
    anchors: jax.Array | np.ndarray,
    objectness: jax.Array,
    deltas: jax.Array,
    present: jax.Array,
    size: jax.Array,
    *,
    train: bool,
) -> Proposals:
    """``propose`` with the numbers of a config: many in training, few in testing."""
    return propose(
        objectness,
        deltas,
        jnp.asarray(anchors),
        present,
        size,
        candidates=config.train_candidates if train else config.test_candidates,
        count=config.train_proposals if train else config.test_proposals,
        threshold=config.proposal_nms,
        smallest=config.smallest_proposal,
    )


def prepared(images: jax.Array, statistics: PixelStatistics) -> jax.Array:
    """Uint8 images (B, H, W, 3) as the net takes them."""
    return normalize(to_unit(images), statistics)


def proposals_of(net: FasterRCNN, maps: jax.Array, sizes: jax.Array) -> Proposals:
    """The proposals (B, P, ...) of a bound net in testing."""
    objectness, deltas = net.rpn_of(maps, sizes)
    choose = functools.partial(
        propose_from, net.config, net.anchors.grid(*maps.shape[1:3]), train=False
    )
    return jax.vmap(choose)(objectness, deltas, net.present(maps, sizes), sizes)
