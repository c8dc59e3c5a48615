"""A page with the figures of an evaluation."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from resnet_jax.analysis import pages
from resnet_jax.analysis.plots import calibration_diagram, confusion_figure
from resnet_jax.console import describe
from resnet_jax.data.sources.imagenet import readable_names
from resnet_jax.storage import writing

_MOST_ROWS = 20
_MOST_DRAWN = 60
"""Classes of a confusion matrix that is drawn."""


def write_page(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Writes the result of ``evaluate_nets`` as a self-contained HTML page.

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
        parts += [pages.heading(name), *_net(found)]
    with writing(path) as temporary:
        temporary.write_text(pages.page("Evaluation", *parts))


def _net(found: Mapping[str, Any]) -> list[str]:
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
        parts.append(pages.svg(calibration_diagram(bins)))
        parts += _classes(found)
    return parts


def _classes(found: Mapping[str, Any]) -> list[str]:
    """The worst classes, the commonest confusions and their matrix."""
    classes = found["classes"]
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
    parts = [pages.heading("Classes with the largest error", 3)]
    parts.append(pages.grid(header, rows))
    if "confusion" in found:
        parts += _confusions(found["confusion"], found["class_names"])
    return parts


def _confusions(
    pairs: Sequence[tuple[int, int, int]], class_names: Sequence[str]
) -> list[str]:
    names = readable_names(class_names)
    wrong = sorted((p for p in pairs if p[0] != p[1]), key=lambda pair: -pair[2])
    rows = [[names[a], names[b], str(count)] for a, b, count in wrong[:_MOST_ROWS]]
    parts = []
    if rows:
        parts.append(pages.heading("Commonest confusions", 3))
        parts.append(pages.grid(("right class", "predicted", "examples"), rows))
    if len(names) <= _MOST_DRAWN:
        parts.append(pages.svg(confusion_figure(pairs, names)))
    return parts
