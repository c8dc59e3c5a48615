"""Losses over the steps, and precision over recall, drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resnet_jax.analysis.plots import literal
from resnet_jax.detection.voc_ap import ClassPrecision, VocPrecision
from resnet_jax.errors import UserError

_MOST_POINTS = 300  # of a line
_MOST_CLASSES = 80
_COLUMNS = 4


_Lines = dict[str, tuple[str, dict[str, Any]]]
"""Column of metrics.jsonl to label and style."""

_LOSSES: _Lines = {
    "train_loss": ("all", {"color": "#222222", "linewidth": 2.0}),
    "train_rpn_loss": ("RPN, object or not", {"color": "#4477aa"}),
    "train_rpn_box_loss": ("RPN, boxes", {"color": "#4477aa", "linestyle": "--"}),
    "train_class_loss": ("regions, classes", {"color": "#cc3311"}),
    "train_box_loss": ("regions, boxes", {"color": "#cc3311", "linestyle": "--"}),
}
_PRECISIONS: _Lines = {
    "test_map_area": ("mAP by area", {"color": "#cc3311", "linewidth": 2.0}),
    "test_map_11": ("mAP by 11 points", {"color": "#cc3311", "linestyle": "--"}),
    "test_ap": ("COCO AP", {"color": "#228833", "linewidth": 2.0}),
}


def detector_curves(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Training losses, and the precision on the test split, over the steps.

    Args:
      rows: of metrics.jsonl. A run that is only tested at its end has no panel for the
        precision.
      title: above the panels.
    """
    tested = [row for row in rows if not row.keys().isdisjoint(_PRECISIONS)]
    count = 2 if len(tested) > 1 else 1
    figure = Figure((5 * count, 4), layout="constrained")
    if title:
        figure.suptitle(literal(title))
    for axes, lines, name, unit in zip(
        figure.subplots(1, count, squeeze=False).flat,
        (_LOSSES, _PRECISIONS),
        ("training loss", "precision (%)"),
        (1, 100),
        strict=False,
    ):
        for key, (label, style) in lines.items():
            points = [(row["step"], unit * row[key]) for row in rows if key in row]
            if points:
                marker = "o" if len(points) == 1 else None
                axes.plot(
                    *zip(*points, strict=True), label=label, marker=marker, **style
                )
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
        axes.legend(frameon=False, fontsize=8, **above)
        _plain(axes)
    return figure


def precision_recall_figure(precision: VocPrecision, title: str = "") -> Figure:
    """Precision over recall, a panel for each class, with its AP by area.

    The line is the precision after each object that was found; the area below it is
    made monotonic, as for the AP by area.

    Args:
      precision: of the classes. Those without objects are left out; of more than 80,
        those with most objects are drawn.
      title: above all panels.

    Raises:
      UserError: no class has an object.
    """
    classes = [found for found in precision.classes if found.objects]
    if not classes:
        raise UserError("no class has an object: there is no precision to draw")
    if len(classes) > _MOST_CLASSES:
        least = sorted(found.objects for found in classes)[-_MOST_CLASSES]
        classes = [found for found in classes if found.objects >= least]
        classes = classes[:_MOST_CLASSES]
    columns = min(_COLUMNS, len(classes))
    rows = -(-len(classes) // columns)
    side = 2.3
    figure = Figure((side * columns, (side + 0.15) * rows), layout="constrained")
    if title:
        figure.suptitle(literal(title))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(panels.flat):
        if place < len(classes):
            _draw(axes, classes[place])
            axes.tick_params(labelbottom=place + columns >= len(classes))
        else:
            axes.set_axis_off()
    figure.supxlabel("recall", fontsize="medium")
    figure.supylabel("precision", fontsize="medium")
    return figure


def _draw(axes, found: ClassPrecision) -> None:
    recalls, precisions = _points(found)
    tops = np.maximum.accumulate(precisions[::-1])[::-1]
    axes.fill_between(recalls, tops, step="pre", color="#4477aa", alpha=0.25, lw=0)
    axes.plot(recalls, precisions, color="#4477aa", linewidth=1.4)
    axes.set_title(literal(f"{found.name} {100 * (found.ap_area or 0):.1f}"), size=10.5)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])
    axes.tick_params(labelsize=9)
    _plain(axes)


def _plain(axes) -> None:
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _points(found: ClassPrecision) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision after each right detection, from recall 0; some of many."""
    right = np.flatnonzero(np.diff(found.recalls, prepend=0) > 0)
    if right.size == 0:
        return np.zeros(1), np.zeros(1)
    if right.size > _MOST_POINTS:
        right = right[np.linspace(0, right.size - 1, _MOST_POINTS).round().astype(int)]
    return (
        np.concatenate([[0], found.recalls[right]]),
        np.concatenate([found.precisions[right[:1]], found.precisions[right]]),
    )
