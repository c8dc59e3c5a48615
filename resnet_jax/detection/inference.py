"""From a batch of images to detections, by one detector or an ensemble of them.

1. Each detector looks at each scale of the images. At the scale of training, its RPN
   proposes regions.
2. An ensemble shares the union of the proposals.
3. Each detector classifies the regions and regresses their boxes; with several scales,
   by the larger of the features of two. An ensemble takes the mean.
4. With box refinement, the regressed boxes are classified too.
5. Threshold and NMS in each class; with box refinement, then voting.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.config.detection import DetectorConfig
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.detection import improvements
from resnet_jax.detection.faster_rcnn import FasterRCNN, prepared, proposals_of
from resnet_jax.detection.head import Detected, decode_regions, detect
from resnet_jax.detection.rpn import Proposals

Scale = tuple[jax.Array, jax.Array]
"""Padded images (B, H, W, 3), and int (B, 2), height and width of each."""


def detections_of(
    models: Sequence[FasterRCNN],
    variables: Sequence[Any],
    statistics: Sequence[PixelStatistics],
    scales: Sequence[Scale],
    base: int = 0,
) -> Detected:
    """The detections of each image, (B, D, ...), in pixels of the base scale.

    Args:
      models: of the detectors, with the same classes; the first one's config holds for
        what follows the nets.
      variables: params and batch_stats of each.
      statistics: of the pixels that each expects.
      scales: uint8 images from small to large, and their sizes.
      base: the scale of the proposals.
    """
    config, sizes = models[0].config, [size for _, size in scales]
    classifiers, proposals = [], []
    for model, values, pixels in zip(models, variables, statistics, strict=True):
        net = model.bind(values)
        maps = [net.features(prepared(x, pixels), size) for x, size in scales]
        proposals.append(proposals_of(net, maps[base], sizes[base]))
        classifiers.append(_classifier(net, maps, sizes, base, config))
    boxes, valid = _union(proposals, config)
    classify = improvements.average(classifiers)
    if config.test_refine:
        probabilities, boxes, valid = improvements.refine(classify, boxes, valid)
    else:
        probabilities, boxes = classify(boxes)
    return jax.vmap(functools.partial(_detect, config))(probabilities, boxes, valid)


def _union(
    proposals: Sequence[Proposals], config: DetectorConfig
) -> tuple[jax.Array, jax.Array]:
    """The boxes (B, P, 4) and valid (B, P) of all proposals."""
    boxes, valid = [each.boxes for each in proposals], [p.valid for p in proposals]
    if len(proposals) == 1:
        return boxes[0], valid[0]
    union = functools.partial(improvements.union, threshold=config.proposal_nms)
    return jax.vmap(union)(boxes, valid)


def _classifier(
    net: FasterRCNN,
    maps: Sequence[jax.Array],
    sizes: Sequence[jax.Array],
    base: int,
    config: DetectorConfig,
) -> improvements.Classifier:
    """A classifier of regions (B, R, 4) in pixels of the base scale."""

    def classify(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
        if len(maps) == 1:
            logits, deltas = net.classify(maps[0], boxes, sizes[0])
        else:
            features = _merged(net, maps, sizes, base, boxes, config)
            logits, deltas = net.head(features)
        decode = functools.partial(decode_regions, num_classes=net.num_classes)
        return nn.softmax(logits), jax.vmap(decode)(deltas, boxes, sizes[base])

    return classify


def _merged(
    net: FasterRCNN,
    maps: Sequence[jax.Array],
    sizes: Sequence[jax.Array],
    base: int,
    boxes: jax.Array,
    config: DetectorConfig,
) -> jax.Array:
    """The features (B, R, d) of regions, each the larger of those at two scales."""
    boxes = net.all_regions(boxes, sizes[base])
    choose = functools.partial(
        improvements.choose_scales, pixels=config.test_region_side**2
    )
    chosen = jax.vmap(choose)(boxes, sizes[base], jnp.stack(sizes, axis=1))
    rescale = jax.vmap(improvements.rescale)
    pooled = [
        net.pool(each, rescale(boxes, sizes[base], size), size)
        for each, size in zip(maps, sizes, strict=True)
    ]
    low, high = improvements.take_scales(pooled, chosen)
    return net.joined(jnp.maximum(net.tail_features(low), net.tail_features(high)))


def _detect(
    config: DetectorConfig,
    probabilities: jax.Array,
    boxes: jax.Array,
    valid: jax.Array,
) -> Detected:
    """The detections of one image; see ``head.detect``."""
    found = detect(probabilities, boxes, valid, config)
    if not config.test_refine:
        return found
    scores = probabilities[:, :-1]
    votes = valid[:, None] & (scores > config.score_threshold)
    classes = jnp.broadcast_to(jnp.arange(scores.shape[1]), scores.shape)
    moved = improvements.vote(
        found.boxes,
        found.classes,
        boxes.reshape(-1, 4),
        scores.ravel(),
        classes.ravel(),
        votes.ravel(),
        config.test_vote,
    )
    return found._replace(boxes=moved)
