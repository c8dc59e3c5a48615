"""COCO's twelve figures, computed by faster-coco-eval."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from resnet_jax.detection.annotations import Annotation
from resnet_jax.detection.detections import Detections
from resnet_jax.detection.voc_ap import check_images
from resnet_jax.environment import how_to_install
from resnet_jax.errors import UserError

FIGURES = {
    "AP": "average precision, mean over the overlaps 0.50, 0.55, ..., 0.95",
    "AP50": "average precision at overlap 0.50",
    "AP75": "average precision at overlap 0.75",
    "APs": "AP of objects below 32 x 32 pixels",
    "APm": "AP of objects from 32 x 32 to 96 x 96 pixels",
    "APl": "AP of objects above 96 x 96 pixels",
    "AR1": "average recall with the best detection of each class and image",
    "AR10": "average recall with ten detections of each class and image",
    "AR100": "average recall with a hundred detections of each class and image",
    "ARs": "AR100 of objects below 32 x 32 pixels",
    "ARm": "AR100 of objects from 32 x 32 to 96 x 96 pixels",
    "ARl": "AR100 of objects above 96 x 96 pixels",
}
"""The figures in COCO's order, and what they mean."""


@dataclasses.dataclass(frozen=True)
class CocoFigures:
    """COCO's figures as shares; None where no object counts.

    Attributes:
      figures: by the names of ``FIGURES``.
      by_class: AP and AP50 of each class, by its name.
    """

    figures: dict[str, float | None]
    by_class: dict[str, dict[str, float | None]]


def coco_figures(
    annotations: Sequence[Annotation],
    detections: Sequence[Detections],
    class_names: Sequence[str],
    category_ids: Sequence[int] | None = None,
) -> CocoFigures:
    """COCO's twelve figures.

    Crowds are ignored: a detection inside one counts neither as right nor as wrong. The
    size of an object is ``Annotation.areas``: for COCO, the area of its segmentation.
    Difficult objects count like all others, since COCO has none.

    Detections with equal scores keep the order of the images, as in COCO's own code,
    which sorts images by number.

    Args:
      annotations: of each image.
      detections: of each image, in the same order.
      class_names: by class.
      category_ids: numbers of the classes in COCO's files, some of which are missing
        there; by default 1 and up.

    Raises:
      UserError: faster-coco-eval is not installed, there are no images, their numbers
        differ, or a class has no name.
    """
    check_images(annotations, detections, len(class_names))
    ids = list(category_ids or range(1, len(class_names) + 1))
    evaluation = _evaluated(annotations, detections, class_names, ids)
    # Overlaps, recalls, classes, sizes (all first), most detections (100 last).
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    places = {number: place for place, number in enumerate(sorted(ids))}
    by_class = {
        name: {
            "AP": _mean(precision[:, :, places[number]]),
            "AP50": _mean(precision[0, :, places[number]]),
        }
        for name, number in zip(class_names, ids, strict=True)
    }
    figures = dict(zip(FIGURES, map(_known, evaluation.stats), strict=True))
    return CocoFigures(figures, by_class)


def _evaluated(
    annotations: Sequence[Annotation],
    detections: Sequence[Detections],
    class_names: Sequence[str],
    ids: list[int],
) -> Any:
    """The COCOeval of the library, which has run."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise UserError(
            "COCO's figures need faster-coco-eval, which is not installed; install it "
            f"with: {how_to_install('detection')}"
        ) from error
    shared = {
        "images": [
            {"id": index, "height": each.size[0], "width": each.size[1]}
            for index, each in enumerate(annotations, 1)
        ],
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(ids, class_names, strict=True)
        ],
    }
    evaluation = COCOeval_faster(
        COCO({**shared, "annotations": _objects(annotations, ids)}),
        COCO({**shared, "annotations": _found(detections, ids)}),
        iouType="bbox",
    )
    evaluation.run()
    return evaluation


def _objects(annotations: Sequence[Annotation], ids: list[int]) -> list[dict[str, Any]]:
    """The objects as in COCO's files."""
    items = [
        {
            "image_id": image,
            "category_id": ids[label],
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
        }
        for image, each in enumerate(annotations, 1)
        for box, label, area, crowd in zip(
            _corner_and_sides(each.boxes),
            each.classes,
            each.areas.tolist(),
            each.crowd,
            strict=True,
        )
    ]
    return _numbered(items)


def _found(detections: Sequence[Detections], ids: list[int]) -> list[dict[str, Any]]:
    """The detections as in COCO's files of results."""
    items = [
        {
            "image_id": image,
            "category_id": ids[label],
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "score": score,
        }
        for image, found in enumerate(detections, 1)
        for box, label, score in zip(
            _corner_and_sides(found.boxes),
            found.classes,
            found.scores.tolist(),
            strict=True,
        )
    ]
    return _numbered(items)


def _numbered(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # From 1: COCO's code takes an object with the number 0 for no object.
    return [{"id": number, **item} for number, item in enumerate(items, 1)]


def _corner_and_sides(boxes: np.ndarray) -> list[list[float]]:
    """Boxes as x, y, width, height."""
    corners = boxes.astype(np.float64)
    corners[:, 2:] -= corners[:, :2]
    return corners.tolist()


def _mean(precision: np.ndarray) -> float | None:
    """The mean of the values that exist; COCO's code marks others with -1."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def _known(figure: float) -> float | None:
    return None if figure == -1 else float(figure)
