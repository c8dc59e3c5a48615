"""The four losses of Faster R-CNN, over denominators that never vary.

Classification and boxes, of anchors and of regions. Each loss is a sum over the sampled
anchors or regions of an image, divided by the size of a full sample, and averaged over
the images. An image with few objects weighs as much as any other.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax.config.detection import DetectorConfig
from resnet_jax.detection.boxes import encode, iou
from resnet_jax.detection.head import DELTA_WEIGHTS
from resnet_jax.detection.matching import match
from resnet_jax.detection.rpn import ANCHOR_WEIGHTS, Proposals
from resnet_jax.detection.sampling import sample

_LONGEST = 4096
"""More cells than a row of a map has."""

RPN_BETA, HEAD_BETA = 1 / 9, 1.0
"""Where the smooth L1 losses turn linear (py-faster-rcnn's sigma is 3 and 1)."""


class AnchorSample(NamedTuple):
    """The anchors of one image that the RPN learns from.

    Attributes:
      indices: int32 (S,).
      labels: int32 (S,): 1 an object, 0 background, -1 an unused slot.
      targets: float32 (S, 4), deltas to the anchors' boxes.
    """

    indices: jax.Array
    labels: jax.Array
    targets: jax.Array


class RegionSample(NamedTuple):
    """The regions of one image that the head learns from.

    Attributes:
      boxes: float32 (R, 4).
      labels: int32 (R,): a class, K for background, -1 for an unused slot.
      targets: float32 (R, 4), weighted deltas to the regions' objects.
    """

    boxes: jax.Array
    labels: jax.Array
    targets: jax.Array


def anchor_places(height: int, width: int, per_cell: int) -> np.ndarray:
    """Numbers of the anchors of a map, int32 (N,), the same for every padding."""
    rows, columns = np.mgrid[:height, :width].reshape(2, -1)
    cells = rows * _LONGEST + columns
    return (
        (cells[:, None] * per_cell + np.arange(per_cell)).reshape(-1).astype(np.int32)
    )


def sample_anchors(
    key: jax.Array,
    anchors: jax.Array,
    present: jax.Array,
    places: jax.Array,
    size: jax.Array,
    boxes: jax.Array,
    classes: jax.Array,
    config: DetectorConfig,
) -> AnchorSample:
    """Draws anchors of one image; half of them objects, if there are enough.

    Args:
      key: of the image and step.
      anchors: float32 (N, 4).
      present: bool (N,), anchors of cells inside the image.
      places: int32 (N,), numbers of the anchors that do not depend on the padding.
      size: int (2,), of the image.
      boxes: float32 (G, 4), its objects.
      classes: int32 (G,), -1 for an absent one.
      config: of the detector.
    """
    used = present
    if not config.border_anchors:
        height, width = size[0], size[1]
        within = (anchors[:, :2] >= 0).all(-1) & (anchors[:, 2] <= width)
        used = used & within & (anchors[:, 3] <= height)
    # An IoU of -1 can be nobody's best.
    overlaps = jnp.where(used, iou(boxes, anchors), -1.0)
    labels, index = match(
        overlaps, classes >= 0, config.rpn_low, config.rpn_high, force_best=True
    )
    labels = jnp.where(used, labels, -1)
    indices, labels = sample(key, labels, config.rpn_samples, 0.5, places)
    targets = encode(boxes[index[indices]], anchors[indices], ANCHOR_WEIGHTS)
    return AnchorSample(indices, labels, targets)


def sample_regions(
    key: jax.Array,
    proposals: Proposals,
    boxes: jax.Array,
    classes: jax.Array,
    config: DetectorConfig,
    num_classes: int,
) -> RegionSample:
    """Draws regions of one image from its proposals and its objects' own boxes.

    Args:
      key: of the image and step.
      proposals: of the image.
      boxes: float32 (G, 4), its objects.
      classes: int32 (G,), -1 for an absent one.
      config: of the detector.
      num_classes: K, the label of the background.
    """
    there = classes >= 0
    regions = jnp.concatenate([proposals.boxes, boxes])
    valid = jnp.concatenate([proposals.valid, there])
    overlaps = iou(boxes, regions)
    labels, index = match(overlaps, there, config.roi_high, config.roi_high)
    best = jnp.where(there[:, None], overlaps, 0.0).max(0)
    # Without an object all is background.
    too_far = (best < config.roi_low) & there.any()
    labels = jnp.where(valid & ~((labels == 0) & too_far), labels, -1)
    indices, drawn = sample(key, labels, config.roi_samples, config.roi_fraction)
    match_of = index[indices]
    classes = jnp.where(drawn == 1, classes[match_of], num_classes)
    targets = encode(boxes[match_of], regions[indices], DELTA_WEIGHTS)
    return RegionSample(regions[indices], jnp.where(drawn < 0, -1, classes), targets)


def rpn_losses(
    objectness: jax.Array,
    deltas: jax.Array,
    drawn: AnchorSample,
    beta: float = RPN_BETA,
) -> tuple[jax.Array, jax.Array]:
    """Of one image: objectness (N,), deltas (N, 4). Log loss, and boxes of objects."""
    count = len(drawn.labels)
    logits = objectness[drawn.indices]
    losses = optax.sigmoid_binary_cross_entropy(
        logits, drawn.labels.astype(logits.dtype)
    )
    classification = jnp.where(drawn.labels >= 0, losses, 0).sum() / count
    boxes = smooth_l1(deltas[drawn.indices] - drawn.targets, beta).sum(-1)
    return classification, jnp.where(drawn.labels == 1, boxes, 0).sum() / count


def head_losses(
    logits: jax.Array, deltas: jax.Array, drawn: RegionSample, beta: float = HEAD_BETA
) -> tuple[jax.Array, jax.Array]:
    """Of one image: logits (R, K + 1), deltas (R, K or 1, 4)."""
    count, background = len(drawn.labels), logits.shape[-1] - 1
    labels = jnp.maximum(drawn.labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    classification = jnp.where(drawn.labels >= 0, losses, 0).sum() / count
    of_class = jnp.minimum(labels, deltas.shape[1] - 1)
    own = jnp.take_along_axis(deltas, of_class[:, None, None], axis=1)[:, 0]
    boxes = smooth_l1(own - drawn.targets, beta).sum(-1)
    is_object = (drawn.labels >= 0) & (drawn.labels < background)
    return classification, jnp.where(is_object, boxes, 0).sum() / count


def smooth_l1(difference: jax.Array, beta: float) -> jax.Array:
    """x^2 / (2 beta) below beta, |x| - beta / 2 above (Girshick 2015, equation 3)."""
    size = jnp.abs(difference)
    return jnp.where(size < beta, difference**2 / (2 * beta), size - beta / 2)


@flax.struct.dataclass
class DetectionSums:
    """Sums over images of the four losses, and int32 counts since the last row."""

    rpn_loss: jax.Array
    rpn_box_loss: jax.Array
    class_loss: jax.Array
    box_loss: jax.Array
    objects: jax.Array  # sampled regions that are objects
    images: jax.Array

    @classmethod
    def zeros(cls) -> "DetectionSums":
        """The sums over no images."""
        # Separate arrays: a donated state must not hold a buffer twice.
        return cls(
            *(jnp.zeros(()) for _ in range(4)),
            *(jnp.zeros((), jnp.int32) for _ in range(2)),
        )

    def __add__(self, other: "DetectionSums") -> "DetectionSums":
        return jax.tree.map(jnp.add, self, other)

    def summary(self) -> dict[str, Any]:
        """Means over the images, as Python numbers. Waits for the devices."""
        sums = jax.device_get(self)
        count = int(sums.images)
        losses = ("rpn_loss", "rpn_box_loss", "class_loss", "box_loss")
        means = {f"train_{name}": float(getattr(sums, name)) / count for name in losses}
        return {
            "train_loss": sum(means.values()),
            **means,
            "train_objects": int(sums.objects) / count,
        }
