"""The report of a detector's run, as a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resnet_jax.analysis import pages
from resnet_jax.console import describe_seconds
from resnet_jax.detection.annotations import Source, decode, missing
from resnet_jax.detection.coco_figures import FIGURES
from resnet_jax.detection.curves import detector_curves, precision_recall_figure
from resnet_jax.detection.detections import Detections, load_detections
from resnet_jax.detection.drawing import draw_boxes
from resnet_jax.detection.result import headline, percent
from resnet_jax.detection.sources import DetectionData
from resnet_jax.detection.voc_ap import voc_average_precision
from resnet_jax.errors import UserError
from resnet_jax.training.report import config_parts
from resnet_jax.workdir import Workdir

DETECTIONS = "detections.npz"
"""The file of a workdir with the detections on the test split."""

_PICTURES = 12
_MOST_CLASSES = 20  # shown unfolded
_LEAST_SCORE = 0.5
_COUNTS = ("images", "objects", "difficult", "crowds", "detections")


def write_detection_report(
    folder: Workdir,
    result: dict[str, Any],
    rows: list[dict[str, Any]],
    data: DetectionData,
) -> None:
    """Writes report.html: curves, precision by class, and pictures with boxes.

    Args:
      folder: of the run.
      result: the content of result.json.
      rows: of metrics.jsonl.
      data: of the run; its test split is drawn.
    """
    title = f"Faster R-CNN, {result['model']}"
    figures: list[str] = []
    if "voc" in result:
        *_, detections = load_detections(folder.path / DETECTIONS)
        about = (
            f"The last checkpoint (step {result['step']:,}) on every test image, one "
            f"run with seed {result['seed']}. The test set chose no checkpoint."
        )
        figures = [
            pages.paragraph(headline(result), "error"),
            pages.paragraph(about),
            *precision_parts(result, data.test, detections),
        ]
    run = {
        "parameters": f"{result['parameters']:,}",
        "weights": result["weights"] or "random",
        "training images": f"{result['training_images']:,}",
        "length": f"{result['step']:,} steps of {result['global_batch_size']}, "
        f"{result['epoch']:.4g} epochs",
        "time": describe_seconds(result["seconds"]),
        **{name: result[name] for name in ("finished", "command")},
    }
    page = pages.page(
        title,
        *figures,
        pages.heading("Training"),
        pages.svg(detector_curves(rows)),
        pages.facts(run),
        *config_parts(folder),
        pages.heading("Where it ran"),
        pages.facts(result["environment"]),
    )
    folder.write(folder.report, page)


def precision_parts(
    result: Mapping[str, Any], source: Source, detections: Sequence[Detections]
) -> list[str]:
    """Parts of a page: figures, precision by class, curves, and pictures with boxes.

    Args:
      result: of ``evaluation_result``.
      source: the images that were tested.
      detections: of each image.

    Raises:
      UserError: as ``voc_average_precision``, or an image cannot be read.
    """
    annotations = [source.annotation(index) for index in range(len(source))]
    precision = voc_average_precision(annotations, detections, source.class_names)
    about = {name: f"{result[name]:,}" for name in _COUNTS}
    for name, value in result["protocol"].items():
        if value is not None and value is not False:
            about[f"protocol: {name.replace('_', ' ')}"] = value
    parts = [pages.facts(about)]
    if "coco" in result:
        rows = [
            [name, percent(result["coco"][name]), meaning]
            for name, meaning in FIGURES.items()
        ]
        parts += [pages.heading("COCO's figures"), pages.grid(("", "", ""), rows)]
    classes = [_classes(result)]
    if precision.map_area is not None:
        about_curves = "Precision over recall, with the AP by area (%)"
        classes.append(pages.heading(about_curves, 3))
        classes.append(pages.svg(precision_recall_figure(precision)))
    if len(source.class_names) > _MOST_CLASSES:
        classes = [pages.folded(f"{len(source.class_names)} classes", *classes)]
    parts += [pages.heading("Classes"), *classes]
    return [*parts, *_pictures(source, detections)]


def _classes(result: Mapping[str, Any]) -> str:
    """A table of the classes, in their order."""
    columns = {
        "objects": "objects",
        "ignored": "ignored",
        "detections": "detections",
        "ap_area": "AP by area (%)",
        "ap_11": "AP by 11 points (%)",
        "AP": "COCO AP (%)",
        "AP50": "COCO AP50 (%)",
    }
    classes = result["classes"]
    shown = [name for name in columns if name in next(iter(classes.values()), {})]

    def cell(value: float | None) -> str:
        if isinstance(value, float):
            return f"{100 * value:.2f}"
        return "" if value is None else f"{value:,}"

    rows = [
        [name, *(cell(found[column]) for column in shown)]
        for name, found in classes.items()
    ]
    return pages.grid(("class", *(columns[name] for name in shown)), rows)


def _pictures(source: Source, detections: Sequence[Detections]) -> list[str]:
    """Some images, evenly spaced, with what is there and what was found."""
    absent = set(missing(source))
    there = [index for index in range(len(source)) if source.name(index) not in absent]
    places = np.linspace(0, len(there) - 1, min(_PICTURES, len(there))).round()
    chosen = [there[int(place)] for place in places]
    if not chosen:
        return []
    drawn, captions = [], []
    for index in chosen:
        try:
            pixels = decode(source, index)
        except UserError:  # a broken image, which the run has named
            continue
        found = detections[index].above(_LEAST_SCORE)
        annotation = source.annotation(index)
        drawn.append(
            draw_boxes(
                pixels,
                source.class_names,
                found,
                annotation,
                least_score=_LEAST_SCORE,
            )
        )
        captions.append(
            f"{source.name(index)}: {len(annotation.boxes)} objects, {len(found)} found"
        )
    about = (
        f"Evenly spaced test images. Solid: found, with the score in percent, from "
        f"{100 * _LEAST_SCORE:.0f}. Dashed: there; dotted: there, but ignored as "
        "difficult or a crowd."
    )
    return [
        pages.heading("Pictures"),
        pages.paragraph(about, "note"),
        pages.pictures(drawn, captions, large=True),
    ]
