"""Average precision as PASCAL VOC defines it, by 11 points and by area."""

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

from resnet_jax.detection.annotations import Annotation
from resnet_jax.detection.detections import Detections
from resnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ClassPrecision:
    """The precision of one class.

    Attributes:
      name: of the class.
      objects: the number that count.
      ignored: the number of other objects: difficult ones and crowds.
      detections: the number found, ignored ones among them.
      ap_11: the mean of the precisions at the recalls 0, 0.1, ..., 1, each the largest
        at that recall or a higher one (VOC 2007); None if no object counts.
      ap_area: the area below the curve made monotonic (VOC 2010 and later); None if no
        object counts.
      recalls: float64 (detections,), after each detection, by falling score.
      precisions: float64 (detections,), the same.
      scores: float32 (detections,), falling.
    """

    name: str
    objects: int
    ignored: int
    detections: int
    ap_11: float | None
    ap_area: float | None
    recalls: np.ndarray
    precisions: np.ndarray
    scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class VocPrecision:
    """The precision of all classes.

    Attributes:
      iou: what the overlap must exceed.
      classes: one item for each class, in their order.
    """

    iou: float
    classes: tuple[ClassPrecision, ...]

    @property
    def map_11(self) -> float | None:
        """The mean of ``ap_11`` over the classes with objects; None without any."""
        return _mean([found.ap_11 for found in self.classes])

    @property
    def map_area(self) -> float | None:
        """The mean of ``ap_area`` over the classes with objects; None without any."""
        return _mean([found.ap_area for found in self.classes])


def voc_average_precision(
    annotations: Sequence[Annotation],
    detections: Sequence[Detections],
    class_names: Sequence[str],
    iou: float = 0.5,
) -> VocPrecision:
    """Average precision of each class, by the arithmetic of py-faster-rcnn's voc_eval.

    All detections of a class are taken by falling score. One whose best object of that
    class and image overlaps by more than ``iou`` is right the first time and wrong if
    the object was found before. If that best object is difficult or a crowd, the
    detection is ignored. All others are wrong.

    VOC's files count pixels from 1 and include the last one, so that a width is
    xmax - xmin + 1. Here a box is (xmin - 1, ymin - 1, xmax, ymax), and x2 - x1 is the
    same width: both give the same overlaps. VOC's own MATLAB code accepts an overlap of
    exactly ``iou`` too, and py-faster-rcnn rounds scores to three digits before.

    Detections with equal scores, whose order the official code leaves to an unstable
    sort, keep the order of the images and their own.

    Args:
      annotations: of each image.
      detections: of each image, in the same order.
      class_names: by class. A class without objects has no AP and no part in the mean.
      iou: what the overlap must exceed.

    Raises:
      UserError: there are no images, their numbers differ, or a class has no name.
    """
    check_images(annotations, detections, len(class_names))
    overlaps, places = _best_objects(annotations, detections)
    found_classes = np.concatenate([found.classes for found in detections])
    scores = np.concatenate([found.scores for found in detections])
    classes = np.concatenate([each.classes for each in annotations])
    ignored = np.concatenate([each.difficult | each.crowd for each in annotations])
    results = []
    for label, name in enumerate(class_names):
        mine = np.flatnonzero(found_classes == label)
        mine = mine[np.argsort(-scores[mine], kind="stable")]
        right, wrong = _judge(overlaps[mine] > iou, places[mine], ignored)
        counts = np.bincount(ignored[classes == label], minlength=2)
        results.append(_summary(name, counts, scores[mine], right, wrong))
    return VocPrecision(iou, tuple(results))


def check_images(
    annotations: Sequence[Annotation],
    detections: Sequence[Detections],
    num_classes: int,
) -> None:
    """Raises UserError unless each image has detections, of classes that exist."""
    if not annotations:
        raise UserError("there are no images to evaluate; expected at least one")
    if len(annotations) != len(detections):
        raise UserError(
            f"there are detections of {len(detections):,} images and annotations of "
            f"{len(annotations):,}; expected the same images in the same order"
        )
    _check_classes("an object", [each.classes for each in annotations], num_classes)
    _check_classes("a detection", [found.classes for found in detections], num_classes)


def _check_classes(what: str, by_image: Sequence[np.ndarray], num_classes: int) -> None:
    for index, classes in enumerate(by_image):
        strange = classes[(classes < 0) | (classes >= num_classes)]
        if strange.size:
            raise UserError(
                f"{what} of image {index} has class {strange[0]}; there are "
                f"{num_classes} classes, numbered from 0"
            )


def _best_objects(
    annotations: Sequence[Annotation], detections: Sequence[Detections]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each detection, the largest overlap with an object of its class and image.

    Returns:
      overlaps: float64 (detections,); 0 if there is no such object.
      places: int64 (detections,) of the object among those of all images, the first
        one of equals.
    """
    overlaps, places, start = [], [], 0
    for annotation, found in zip(annotations, detections, strict=True):
        best, place = np.zeros(len(found)), np.full(len(found), -1)
        if len(found) and len(annotation.boxes):
            table = _overlaps(found.boxes, annotation.boxes)
            table[found.classes[:, None] != annotation.classes] = -1
            place = table.argmax(1)
            best = table[np.arange(len(found)), place]
        overlaps.append(best)
        places.append(place + start)
        start += len(annotation.boxes)
    return np.concatenate(overlaps), np.concatenate(places)


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union (n, m) of boxes (n, 4) and (m, 4), in float64."""
    a, b = a.astype(np.float64)[:, None], b.astype(np.float64)[None]
    corners = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.maximum(corners, 0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    union -= shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _judge(
    overlaps_enough: np.ndarray, places: np.ndarray, ignored: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of a class, by falling score, are right and which are wrong."""
    hits = np.flatnonzero(overlaps_enough)
    counted = hits[~ignored[places[hits]]]
    _, first = np.unique(places[counted], return_index=True)
    right = np.zeros(len(places), bool)
    right[counted[first]] = True
    wrong = ~overlaps_enough
    wrong[counted] = True
    return right, wrong & ~right


def _summary(
    name: str,
    counts: np.ndarray,
    scores: np.ndarray,
    right: np.ndarray,
    wrong: np.ndarray,
) -> ClassPrecision:
    """The precision of a class with ``counts`` of counted and of ignored objects."""
    objects, ignored = map(int, counts)
    hits, faults = np.cumsum(right), np.cumsum(wrong)
    recalls = hits / max(objects, 1)
    precisions = hits / np.maximum(hits + faults, 1)
    return ClassPrecision(
        name=name,
        objects=objects,
        ignored=ignored,
        detections=len(scores),
        ap_11=_ap_11(recalls, precisions) if objects else None,
        ap_area=_ap_area(recalls, precisions) if objects else None,
        recalls=recalls,
        precisions=precisions,
        scores=scores,
    )


def _ap_11(recalls: np.ndarray, precisions: np.ndarray) -> float:
    # The official thresholds, of which 0.30000000000000004 is one.
    tops = [
        precisions[recalls >= threshold].max(initial=0)
        for threshold in np.arange(0.0, 1.1, 0.1)
    ]
    return float(np.mean(tops))


def _ap_area(recalls: np.ndarray, precisions: np.ndarray) -> float:
    monotonic = np.maximum.accumulate(precisions[::-1])[::-1]
    return float(np.sum(np.diff(recalls, prepend=0) * monotonic))


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else None
