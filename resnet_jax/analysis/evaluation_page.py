"""A page with the figures of an evaluation."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resnet_jax.analysis import pages
from resnet_jax.analysis.plots import calibration_diagram, confusion_figure
from resnet_jax.console import describe
from resnet_jax.data.sources.imagenet import readable_names
from resnet_jax.storage import writing

_MOST_ROWS = 20
_MOST_DRAWN = 60
"""Classes of a confusion matrix that is drawn."""


Pictures = Mapping[int, np.ndarray]
"""The uint8 images (h, w, c) of mistakes, by the index of their example."""


def write_page(
    path: str | os.PathLike[str],
    result: Mapping[str, Any],
    pictures: Pictures | None = None,
) -> None:
    """Writes the result of ``evaluate_nets`` as a self-contained HTML page.

    Args:
      path: of the page.
      result: of ``evaluate_nets``.
      pictures: that its ``on_mistake`` received. Without them, the page names the files
        of the mistakes.

    Raises:
      UserError: the file cannot be written.
    """
    nets = [(found["source"], found) for found in result["nets"]]
    if "ensemble" in result:
        nets.append((f"ensemble of {len(nets)} nets", result["ensemble"]))
    about = {
        "data": f"{result['data']['kind']}, split {result['split']}",
        "classes": describe(result["answers"]),
        "device": result["environment"]["devices"],
        "command": result["command"],
        "finished": result["finished"],
    }
    parts = [pages.facts(about)]
    for name, found in nets:
        parts += [pages.heading(name), *_net(found, pictures)]
    with writing(path) as temporary:
        temporary.write_text(pages.page("Evaluation", *parts), "utf-8")


def _net(found: Mapping[str, Any], pictures: Pictures | None) -> list[str]:
    counts = f"{found['errors']} of {found['count']}"
    parts = [pages.paragraph(f"error {100 * found['error']:.2f} % ({counts})", "error")]
    values: dict[str, Any] = {}
    if "top5_error" in found:
        values["top-5 error"] = f"{100 * found['top5_error']:.2f} %"
    if "loss" in found:
        values["negative log-likelihood"] = describe(found["loss"])
        ece = found["calibration"]["error"]
        values["expected calibration error"] = f"{100 * ece:.2f} %"
    values |= {key: found[key] for key in ("model", "checksum") if key in found}
    if "step" in found:
        values["step"] = describe(found["step"])
    for key, value in found.get("protocol", {}).items():
        values[f"protocol: {key}"] = value
    parts.append(pages.facts(values))
    if "calibration" in found:
        bins = found["calibration"]["bins"]
        parts += [
            pages.heading("Calibration", 3),
            pages.svg(calibration_diagram(bins)),
            *mistake_parts(found, pictures),
        ]
    return parts


def mistake_parts(
    found: Mapping[str, Any], pictures: Pictures | None = None
) -> list[str]:
    """The worst mistakes, the confusion matrix, and the errors by class.

    Args:
      found: of one net, as ``evaluate`` returns it for examples with one label each.
      pictures: of the mistakes; see ``write_page``.
    """
    return [
        *_worst_mistakes(found["mistakes"], pictures),
        *(_confusions(found) if "confusion" in found else []),
        *_classes(found["classes"]),
    ]


def _worst_mistakes(
    mistakes: Sequence[Mapping[str, Any]], pictures: Pictures | None
) -> list[str]:
    if not mistakes:
        return []
    parts = [pages.heading("Most confident mistakes", 3)]
    right = readable_names(tuple(mistake["class"] for mistake in mistakes))
    wrong = readable_names(tuple(mistake["predicted"] for mistake in mistakes))
    shares = [f"{100 * mistake['probability']:.1f} %" for mistake in mistakes]
    answers = list(zip(right, wrong, shares, strict=True))
    if pictures is None:
        names = [mistake["name"] for mistake in mistakes]
        rows = [[name, *answer] for name, answer in zip(names, answers, strict=True)]
        header = ("example", "right class", "predicted", "probability")
        return [*parts, pages.grid(header, rows)]
    captions = [f"right: {a}\npredicted: {b}\n{share}" for a, b, share in answers]
    shown = [pictures[mistake["index"]] for mistake in mistakes]
    return [*parts, pages.pictures(shown, captions)]


def _classes(classes: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The classes with the largest errors."""
    shown = dict(zip(classes, readable_names(tuple(classes)), strict=True))
    worst = sorted(classes, key=lambda c: -classes[c]["errors"] / classes[c]["count"])
    rows = [
        [
            shown[name],
            f"{100 * classes[name]['errors'] / classes[name]['count']:.2f}",
            str(classes[name]["errors"]),
            str(classes[name]["count"]),
        ]
        for name in worst[:_MOST_ROWS]
    ]
    header = ("class", "error (%)", "errors", "examples")
    return [
        pages.heading("Classes with the largest error", 3),
        pages.grid(header, rows),
    ]


def _confusions(found: Mapping[str, Any]) -> list[str]:
    """The confusion matrix of few classes, and the commonest confusions."""
    pairs, names = found["confusion"], readable_names(found["class_names"])
    parts = [pages.heading("Confusions", 3)]
    if len(names) <= _MOST_DRAWN:
        parts.append(pages.svg(confusion_figure(pairs, names)))
    else:
        parts.append(
            pages.paragraph(
                f"The matrix is drawn for at most {_MOST_DRAWN} classes; these data "
                f"have {len(names):,}.",
                "note",
            )
        )
    wrong = sorted((p for p in pairs if p[0] != p[1]), key=lambda pair: -pair[2])
    rows = [[names[a], names[b], str(count)] for a, b, count in wrong[:_MOST_ROWS]]
    if rows:
        parts.append(pages.grid(("right class", "predicted", "examples"), rows))
    return parts
