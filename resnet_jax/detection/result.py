"""The result of testing a detector, as JSON."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resnet_jax.detection.annotations import Annotation
from resnet_jax.detection.coco_figures import FIGURES, coco_figures
from resnet_jax.detection.detections import Detections
from resnet_jax.detection.voc_ap import VocPrecision, voc_average_precision
from resnet_jax.identity import Identity

MEANINGS = {
    "map_area": "mean over the classes of the area below the curve of precision over "
    "recall, made monotonic (VOC 2010 and later)",
    "map_11": "the same of the mean precision at the recalls 0, 0.1, ..., 1 (VOC 2007)",
}
"""The two mean average precisions of VOC."""


def evaluation_result(
    annotations: Sequence[Annotation],
    names: Sequence[str],
    class_names: Sequence[str],
    category_ids: Sequence[int] | None,
    detections: Sequence[Detections],
    *,
    coco: bool = False,
    protocol: Mapping[str, Any] | None = None,
    identity: Identity | None = None,
) -> tuple[dict[str, Any], VocPrecision]:
    """The figures of a detector on a data set.

    Args:
      annotations: of each image.
      names: of the images.
      class_names: by class.
      category_ids: of the classes in COCO's files, or None.
      detections: of each image, in the same order.
      coco: whether to add COCO's twelve figures.
      protocol: how the detections were made, as JSON: sizes, proposals, thresholds.
      identity: of the data.

    Returns:
      result: an object for JSON; precisions are shares, and None where a class has no
        object. See ``MEANINGS`` and ``coco_figures.FIGURES``.
      precision: the same by VOC, with the curves.

    Raises:
      UserError: as ``voc_average_precision`` and ``coco_figures``.
    """
    precision = voc_average_precision(annotations, detections, class_names)
    classes = {
        found.name: {
            "objects": found.objects,
            "ignored": found.ignored,
            "detections": found.detections,
            "ap_area": found.ap_area,
            "ap_11": found.ap_11,
        }
        for found in precision.classes
    }
    result: dict[str, Any] = {
        "protocol": dict(protocol or {}),
        "data": dataclasses.asdict(identity) if identity else None,
        "ground_truth": _checksum(names, class_names, annotations),
        "images": len(annotations),
        "objects": sum(found.objects for found in precision.classes),
        "difficult": int(sum(each.difficult.sum() for each in annotations)),
        "crowds": int(sum(each.crowd.sum() for each in annotations)),
        "detections": sum(map(len, detections)),
        "voc": {
            "overlap": f"IoU > {precision.iou:g}; difficult objects and crowds ignored",
            "map_area": precision.map_area,
            "map_11": precision.map_11,
            "meanings": MEANINGS,
        },
    }
    if coco:
        found = coco_figures(annotations, detections, class_names, category_ids)
        result["coco"] = {**found.figures, "meanings": FIGURES}
        for name, figures in found.by_class.items():
            classes[name] |= figures
    return {**result, "classes": classes}, precision


def headline(result: Mapping[str, Any]) -> str:
    """The main figures of a result in one line."""
    voc = result["voc"]
    area, points = percent(voc["map_area"]), percent(voc["map_11"])
    parts = [f"mAP {area} by area, {points} by 11 points at IoU 0.5"]
    if "coco" in result:
        coco = result["coco"]
        parts.append(
            f"COCO AP {percent(coco['AP'])}, AP50 {percent(coco['AP50'])}, "
            f"AP75 {percent(coco['AP75'])}"
        )
    counts = f"{result['objects']:,} objects on {result['images']:,} images"
    return f"{'; '.join(parts)} ({counts})"


def row_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The main figures of a result for a row of metrics.jsonl; those that exist."""
    figures = {f"test_{name}": result["voc"][name] for name in ("map_area", "map_11")}
    for name in FIGURES if "coco" in result else ():
        figures[f"test_{name.lower()}"] = result["coco"][name]
    return {name: value for name, value in figures.items() if value is not None}


def percent(share: float | None) -> str:
    """A share in percent, or ``none`` where no object counts."""
    return "none" if share is None else f"{100 * share:.2f} %"


def _checksum(
    names: Sequence[str], class_names: Sequence[str], annotations: Sequence[Annotation]
) -> str:
    """A checksum of what was to be found: equal for equal objects of equal images."""
    digest = hashlib.sha256(
        "\n".join(["", *class_names]).encode("utf-8", "surrogateescape")
    )
    for name, each in zip(names, annotations, strict=True):
        header = f"\n\n{name} {len(each.boxes)}\n"
        digest.update(header.encode("utf-8", "surrogateescape"))
        for field in (each.boxes, each.classes, each.difficult, each.crowd, each.areas):
            digest.update(np.ascontiguousarray(field).tobytes())
    return digest.hexdigest()[:16]
