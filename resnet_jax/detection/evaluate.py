"""Tests of detectors: a whole split by VOC's and COCO's measures."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console

from resnet_jax import distributed
from resnet_jax.analysis import pages
from resnet_jax.config import DetectionConfig
from resnet_jax.console import make_console, say
from resnet_jax.detection.detections import Detections
from resnet_jax.detection.detector import (
    Detector,
    Given,
    finder,
    open_members,
    protocol_of,
)
from resnet_jax.detection.report import precision_parts
from resnet_jax.detection.result import (
    evaluation_result,
    headline,
    percent,
)
from resnet_jax.detection.sources import DetectionData, open_detection_data
from resnet_jax.environment import command_line, environment
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluate import write_result
from resnet_jax.storage import writing


def evaluate_detector(
    detector: Given | Sequence[Given],
    *,
    checkpoint: int | str = "last",
    overrides: Mapping[str, str] | None = None,
    json_path: str | os.PathLike[str] | None = None,
    html_path: str | os.PathLike[str] | None = None,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Tests a detector on ``data.test_split``; prints the precision of each class.

    Args:
      detector: a ``Detector``, or the workdir of a run; or several, an ensemble, whose
        first one says how all of them are tested.
      checkpoint: of each run: "last" or a step.
      overrides: values as text for config fields of ``FREE_FIELDS``: other data, their
        sizes, thresholds; evaluation.metric=coco adds COCO's figures.
        detector.test_refine, detector.test_scales: the improvements of appendix B.
      json_path: file for the result.
      html_path: file for a page with curves and pictures.
      console: where to print; standard output by default.

    Returns:
      See ``result.evaluation_result``, with facts of the run.

    Raises:
      UserError: there is no such run, the data are missing or have other classes, or a
        field cannot be changed.
    """
    console = console or make_console()
    members = open_members(detector, checkpoint, overrides)
    config = members[0].config
    data = _open_data(members[0])
    skipped: list[str] = []
    detections = finder(members)(
        source=data.test,
        batch_size=config.evaluation.batch_size or config.training.global_batch_size,
        skipped=skipped,
    )
    result = figures_of(data, detections, config)
    result |= {
        "split": config.data.test_split,
        "skipped": len(skipped),
        "step": members[0].step,
        "members": [
            {"model": member.config.model.name, "step": member.step}
            for member in members
        ],
        "model": " + ".join(member.config.model.name for member in members),
        "command": command_line(),
        "environment": environment(),
    }
    if not distributed.is_primary():
        return result
    for sentence in skipped:
        say(console, f"warning: left out: {sentence}")
    for name, found in result["classes"].items():
        say(console, f"{percent(found['ap_area']):>9}  {name}")
    say(console, headline(result))
    if json_path is not None:
        write_result(json_path, result)
    if html_path is not None:
        page = pages.page(
            f"Faster R-CNN, {result['model']}",
            pages.paragraph(headline(result), "error"),
            *precision_parts(result, data.test, detections),
        )
        with writing(html_path) as temporary:
            temporary.write_text(page, "utf-8")
        say(console, f"page: {html_path}")
    return result


def _open_data(detector: Detector) -> DetectionData:
    """The data of a detector's config, which must have its classes."""
    data, class_names = open_detection_data(detector.config.data), detector.class_names
    if detector.trained_on is None:  # a file, which knows only their number
        class_names = data.class_names[: len(class_names)]
    if data.class_names != class_names:
        raise UserError(
            f"the detector finds {', '.join(class_names)}, but the data have "
            f"{', '.join(data.class_names)}; give data of its classes, or set "
            "data.class_names to their order in its run"
        )
    return data


def figures_of(
    data: DetectionData, detections: Sequence[Detections], config: DetectionConfig
) -> dict[str, Any]:
    """The figures of the detections in each image of ``data.test``."""
    test = data.test
    images = range(len(test))
    result, _ = evaluation_result(
        [test.annotation(index) for index in images],
        [test.name(index) for index in images],
        data.class_names,
        test.category_ids,
        detections,
        coco=config.evaluation.metric == "coco",
        protocol=protocol_of(config),
        identity=data.identity,
    )
    return result
