"""Figures of runs, drawn like the paper's.

All functions take plain data and return a figure; save it with ``save``. Nets
of a family share a hue, and later nets of a list are darker: plain nets are red,
residual nets blue, others green. Errors are given as shares, 0 to 1, and drawn in
percent.
"""

import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from resnet_jax.errors import UserError, printable
from resnet_jax.evaluation.figures import CALIBRATION_BINS
from resnet_jax.storage import Disk, expand, replacing

SUFFIXES = (".png", ".svg", ".pdf")
"""Kinds of picture files."""

Rows = list[dict[str, Any]]

_SPLITS: dict[str, dict[str, Any]] = {
    "train": {"color": "#4477aa", "linestyle": "--", "linewidth": 1.2},
    "holdout": {"color": "#228833", "linewidth": 1.2},
    "test": {"color": "#cc3311", "linewidth": 2.0},
}


def training_curves(rows: Rows, title: str) -> Figure:
    """Errors and losses over the steps (axes of Fig. 6), from rows of metrics.jsonl.

    Dashed lines are training, bold ones are test. Thin vertical lines mark drops of the
    learning rate.
    """
    figure, panels = _figure(title, 2, (10, 4))
    for axes, metric, scale in zip(panels, ("error", "loss"), (100, 1), strict=True):
        for split, style in _SPLITS.items():
            name = f"{split}_{metric}"
            points = [(r["step"], scale * r[name]) for r in rows if name in r]
            if points:
                marker = "o" if len(points) == 1 else None
                xy = zip(*points, strict=True)
                axes.plot(*xy, label=split, marker=marker, **style)
        axes.set_xlabel("step")
        for step in _drops(rows):
            axes.axvline(step, color="0.7", linewidth=0.8, zorder=0)
        axes.legend(frameon=False)
    names = [f"{split}_error" for split in ("train", "test", "holdout")]
    errors = [100 * row[name] for row in rows for name in names if name in row]
    panels[0].set_ylabel("error (%)")
    # The paper's axis for a run that gets there.
    panels[0].set_ylim(0, 20 if errors[-1] < 10 else 1.05 * max(1.0, *errors))
    panels[1].set_ylabel("loss")
    panels[1].set_yscale("log")
    return figure


def check_file(path: str | os.PathLike[str]) -> Path:
    """The file of a picture, which can then be written.

    Raises:
      UserError: it is a folder, of another kind, or where nothing can be written.
    """
    file = expand(path)
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"figure {file} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        )
    try:
        if file.exists() and not file.is_file():
            raise UserError(f"figure {file} is no file: give the name of a file")
        Disk().check_writable(file.parent)
    except OSError as error:
        raise UserError(
            f"figure {file} cannot be written ({error.strerror}); give another path"
        ) from error
    return file


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a picture, and makes its folder.

    Raises:
      UserError: as ``check_file``, or the disk is full.
    """
    file = check_file(path)
    try:
        with replacing(file) as temporary:
            figure.savefig(temporary, dpi=100, format=file.suffix[1:].lower())
    except OSError as error:
        raise UserError(f"figure {file} cannot be written: {error}") from error
    return file


def literal(text: str) -> str:
    """Text that matplotlib draws as it is, not as a formula between dollars."""
    return printable(text).replace("$", r"\$")


def _drops(rows: Rows) -> list[int]:
    """Steps of the rows at which a constant learning rate fell by half or more."""
    rates = [row["learning_rate"] for row in rows]
    triples = zip(rates, rates[1:], rates[2:], rows[2:], strict=False)
    return [
        row["step"]
        for earlier, before, after, row in triples
        if earlier == before and after < 0.5 * before
    ]


FAMILIES = ("plain", "residual", "other")
"""Kinds of nets; each has a hue, a dash pattern and a marker."""

_RAMPS = {
    family: LinearSegmentedColormap.from_list(family, shades)
    for family, shades in (
        ("plain", ["#e8833a", "#c92a1a", "#640c0c"]),
        ("residual", ["#5aa5e0", "#1c66b8", "#08204f"]),
        ("other", ["#6cbf7b", "#2e8b57", "#0b3d24"]),
    )
}
_DASHES = {"plain": (4, 1.5), "residual": (), "other": (1, 1)}
_MARKERS = {"plain": "s", "residual": "o", "other": "^"}
_LABEL_HEIGHT = 0.055  # least distance of labels, as a share of the axes' height


class Curves(NamedTuple):
    """The runs of one net, each the rows of its metrics.jsonl."""

    label: str
    runs: Sequence[Rows]
    family: str = "residual"


class Layers(NamedTuple):
    """A number for each layer of one net, in the net's order."""

    label: str
    values: Sequence[float]
    family: str = "residual"


class Depths(NamedTuple):
    """Nets that differ only in depth: the test errors of all seeds, by depth."""

    label: str
    errors: Mapping[int, Sequence[float]]
    family: str = "residual"


def training_and_test_error(curves: Sequence[Curves], title: str = "") -> Figure:
    """Training error on the left and test error on the right (axes of Fig. 1).

    Lines are means over the seeds; bands reach from the least to the greatest. The
    training error is over the steps since the previous row, with augmentation.

    Raises:
      UserError: a net has no run, or its runs have no step in common.
    """
    figure, panels = _figure(title, 2, (10, 4))
    look = _look(curves)
    for axes, split in zip(panels, ("train", "test"), strict=True):
        _draw_errors(axes, curves, look, {f"{split}_error": {"linewidth": 2.0}})
    panels[0].set_ylabel("training error (%)")
    panels[1].set_ylabel("test error (%)")
    return figure


def error_curves(panels: Mapping[str, Sequence[Curves]], title: str = "") -> Figure:
    """Errors over the iterations, panel by panel (axes of Fig. 4 and 6).

    Thin dashed lines are training errors, bold ones test errors, as in
    ``training_and_test_error``. All panels have the same axes: the paper's, 0-20 % or
    20-60 % over 1e4 iterations, for runs of its length that end there.

    Raises:
      UserError: a net has no run, or its runs have no step in common.
    """
    figure, all_axes = _figure(title, len(panels), (1 + 4.5 * len(panels), 4.3))
    # A net has one colour in all panels.
    nets = {net.label: net for curves in panels.values() for net in curves}
    look = _look(list(nets.values()))
    thin, bold = {"linewidth": 1.0, "dashes": (4, 2)}, {"linewidth": 2.2}
    for axes, (name, curves) in zip(all_axes, panels.items(), strict=True):
        _draw_errors(axes, curves, look, {"train_error": thin, "test_error": bold})
        axes.set_title(literal(name), fontsize="medium")
        axes.set_ylabel("error (%)")
    key = [
        Line2D([], [], color="0.2", label=label, **style)
        for label, style in (("training", thin), ("test", bold))
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=2, frameon=False)
    return figure


def layer_responses_figure(nets: Sequence[Layers], title: str = "") -> Figure:
    """Standard deviations of layer responses (axes of Fig. 7).

    Top: in the nets' order. Bottom: sorted, the greatest first.
    """
    figure, panels = _figure(title, 2, (9, 5.6), rows=True)
    _draw_layers(panels[0], nets, list)
    _draw_layers(panels[1], nets, lambda values: sorted(values, reverse=True))
    for axes, order in zip(panels, ("", ", sorted"), strict=True):
        axes.set_xlabel(f"layer index{order}")
        axes.set_ylabel("standard deviation")
    lines = panels[0].get_lines()
    figure.legend(handles=lines, loc="outside right center", frameon=False)
    return figure


def gradient_norms_figure(
    panels: Mapping[str, Sequence[Layers]], title: str = ""
) -> Figure:
    """Gradient norms layer by layer; all panels have the same logarithmic axis.

    Norms that are zero or not finite leave a gap.
    """
    width = 9 if len(panels) == 1 else 2 + 3 * len(panels)
    figure, all_axes = _figure(title, len(panels), (width, 3.8))
    lines: dict[str, Any] = {}
    for axes, (name, nets) in zip(all_axes, panels.items(), strict=True):
        axes.sharey(all_axes[0])
        axes.set_yscale("log")
        axes.set_title(literal(name), fontsize="medium")
        _draw_layers(axes, nets, _positive)
        axes.set_xlabel("layer index")
        lines = {line.get_label(): line for line in axes.get_lines()} | lines
    all_axes[0].set_ylabel("norm of the gradient")
    figure.legend(handles=[*lines.values()], loc="outside right center", frameon=False)
    return figure


def error_by_depth(families: Sequence[Depths], title: str = "") -> Figure:
    """Test errors against depth: means and sample standard deviations over the seeds.

    A single run has no bar.
    """
    figure, (axes,) = _figure(title, 1, (6, 4))
    depths = sorted({depth for family in families for depth in family.errors})
    colors = _colors(families)
    for family in families:
        xs = sorted(family.errors)
        means, deviations = _percent([family.errors[x] for x in xs])
        axes.errorbar(
            xs,
            means,
            deviations,
            label=literal(family.label),
            color=colors[family.label],
            capsize=3,
            linewidth=1.8,
            marker=_MARKERS[family.family],
            dashes=_DASHES[family.family],
        )
    if depths[-1] > 10 * depths[0]:
        axes.set_xscale("log")
    axes.set_xticks(depths, labels=map(str, depths))
    axes.set_xticks([], minor=True)
    axes.set_xlabel("layers")
    axes.set_ylabel("test error (%)")
    figure.legend(loc="outside lower center", ncols=len(families), frameon=False)
    return figure


def error_by_setting(
    settings: Mapping[str, Sequence[float]], title: str = ""
) -> Figure:
    """Test errors of settings, top to bottom: means and sample standard deviations.

    Small dots are the runs of a setting, one for each seed; a single run has no bar.
    """
    figure, (axes,) = _figure(title, 1, (7, 1.2 + 0.4 * len(settings)))
    color = _RAMPS["residual"](0.5)
    means, deviations = _percent(list(settings.values()))
    places = range(len(settings))
    for place, errors in zip(places, settings.values(), strict=True):
        xs = [100 * error for error in errors]
        axes.plot(xs, [place + 0.22] * len(xs), ".", markersize=5, color="0.45")
    axes.errorbar(
        means, places, xerr=deviations, color=color, fmt="o", capsize=4, linewidth=1.8
    )
    names = [
        f"{literal(name)} (n = {len(errors)})" for name, errors in settings.items()
    ]
    axes.set_yticks(places, labels=names)
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set_xlabel("test error (%)")
    return figure


def calibration_diagram(bins: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy over confidence, a bar for each bin (Guo et al. 2017, Figure 1).

    Args:
      bins: of ``evaluation.figures.calibration``. The fuller a bin, the darker its bar.
    """
    figure, (axes,) = _figure("", 1, (4.2, 4))
    counts = np.array([found["count"] for found in bins])
    width = 1 / CALIBRATION_BINS
    axes.bar(
        [found["from"] + width / 2 for found in bins],
        [found["accuracy"] for found in bins],
        width,
        color=[("#4477aa", shade) for shade in 0.25 + 0.75 * counts / counts.max()],
        edgecolor="white",
    )
    axes.plot([0, 1], [0, 1], color="0.4", linewidth=1, linestyle="--")
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return figure


def confusion_figure(
    pairs: Iterable[tuple[int, int, int]], class_names: Sequence[str]
) -> Figure:
    """The confusion matrix, in percent of each right class; a row for each of them.

    Args:
      pairs: (label, predicted, count) for all pairs that occur.
      class_names: of both axes.
    """
    size = len(class_names)
    matrix = np.zeros((size, size))
    for label, predicted, count in pairs:
        matrix[label, predicted] = count
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(2.5 + 0.3 * size, 12.0)
    figure, (axes,) = _figure("", 1, (side, side))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.grid(False)
    names = [literal(textwrap.shorten(name, 24)) for name in class_names]
    axes.set_xticks(range(size), names, rotation=90, fontsize=8)
    axes.set_yticks(range(size), names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("right class")
    if size <= 20:
        for label, predicted in zip(*np.nonzero(matrix), strict=True):
            dark = shares[label, predicted] > 50
            axes.text(
                predicted,
                label,
                f"{matrix[label, predicted]:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
    return figure


def _figure(title, count, size, rows=False):
    """A figure and its ``count`` panels, side by side or in rows."""
    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(literal(title))
    shape = (count, 1) if rows else (1, count)
    panels = list(figure.subplots(*shape, squeeze=False).flat)
    for axes in panels:
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _colors(nets: Iterable[Any]) -> dict[str, Any]:
    """Label to a shade of the net's family; later nets are darker."""
    families: dict[str, list[str]] = {name: [] for name in FAMILIES}
    for net in nets:
        if net.family not in FAMILIES:
            raise UserError(
                f"a family of nets is {', '.join(FAMILIES)}, not {net.family!r}"
            )
        families[net.family].append(net.label)
    if not any(families.values()):
        raise UserError("there is no net to draw")
    return {
        label: _RAMPS[family](index / (len(labels) - 1) if len(labels) > 1 else 0.5)
        for family, labels in families.items()
        for index, label in enumerate(labels)
    }


class _Look(NamedTuple):
    """The colours and axes that all panels of a figure of errors share.

    Attributes:
      colors: of the nets' labels.
      last_step: end of the axis of iterations.
      unit: of the iterations: 1e4 as in the paper, or 1e3 or 1.
      limits: of the errors in percent.
    """

    colors: dict[str, Any]
    last_step: int
    unit: int
    limits: tuple[float, float]


def _look(nets: Sequence[Curves]) -> _Look:
    colors = _colors(nets)
    last_step = max(_aligned(net, "test_error")[0][-1] for net in nets)
    unit = 10_000 if last_step >= 20_000 else 1000 if last_step >= 2000 else 1
    names = ("train_error", "test_error")
    lasts = [_aligned(net, name)[1][:, -1] for net in nets for name in names]
    limits = _error_limits(np.concatenate(lasts), is_long=unit == 10_000)
    return _Look(colors, last_step, unit, limits)


def _error_limits(lasts: np.ndarray, is_long: bool) -> tuple[float, float]:
    """0-20 % or 20-60 %, as in the paper, or up to a round number above all lines."""
    if is_long and lasts.min() >= 20 and lasts.max() <= 55:
        return 20, 60
    tops = (20, 40, 60, 80) if is_long else (1, 2, 5, 10, 20, 40, 60, 80)
    return 0, next((top for top in tops if top >= 1.4 * lasts.max()), 100)


def _draw_errors(
    axes: Any, nets: Sequence[Curves], look: _Look, styles: dict[str, dict[str, Any]]
) -> None:
    """Draws lines and bands of all nets, for each column of ``styles``.

    The lines of the last column get labels.
    """
    for name, style in styles.items():
        ends = []
        for net in nets:
            color = look.colors[net.label]
            steps, errors = _aligned(net, name)
            mean, xs = errors.mean(0), steps / look.unit
            marker = "o" if len(steps) == 1 else None
            axes.plot(
                xs, mean, color=color, label=literal(net.label), marker=marker, **style
            )
            if len(errors) > 1:
                low, high = errors.min(0), errors.max(0)
                axes.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
            ends.append((net.label, mean[-1], color))
    axes.set_xlim(0, look.last_step / look.unit)
    axes.set_ylim(*look.limits)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    suffix = {1: "", 1000: " (1e3)", 10_000: " (1e4)"}[look.unit]
    axes.set_xlabel(f"iterations{suffix}")
    _label_ends(axes, ends)


def _aligned(net: Curves, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps common to all runs of a net, and errors in percent (runs, steps)."""
    measured = [
        {row["step"]: 100 * row[name] for row in rows if name in row}
        for rows in net.runs
    ]
    steps = sorted(set.intersection(*map(set, measured))) if measured else []
    if not steps:
        raise UserError(f"the runs of {net.label} have no {name} at a common step")
    errors = [[run[step] for step in steps] for run in measured]
    return np.array(steps), np.array(errors)


def _label_ends(axes: Any, ends: Iterable[tuple[str, float, Any]]) -> None:
    """Writes each line's label right of the axes, near the line's end."""
    to_share = axes.transData + axes.transAxes.inverted()
    wanted = sorted(
        (float(np.clip(to_share.transform((1, value))[1], 0, 1)), label, color)
        for label, value, color in ends
    )
    heights = _apart([height for height, _, _ in wanted], _LABEL_HEIGHT)
    for (_, label, color), height in zip(wanted, heights, strict=True):
        axes.annotate(
            literal(label),
            (1.02, height),
            xycoords="axes fraction",
            color=color,
            verticalalignment="center",
            fontsize=9,
        )


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Ascending heights, moved as little as possible to be ``least`` apart.

    This is isotonic regression by the min-max formula: heights that would overlap
    become a group around their mean.
    """
    steps = least * np.arange(len(heights))
    y = np.array(heights) - steps
    places = range(len(y))
    return [
        steps[i]
        + max(min(y[j : k + 1].mean() for k in places[i:]) for j in places[: i + 1])
        for i in places
    ]


def _draw_layers(
    axes: Any, nets: Sequence[Layers], arrange: Callable[[Any], Sequence[float]]
) -> None:
    colors = _colors(nets)
    for net in nets:
        values = arrange(net.values)
        axes.plot(
            range(1, len(values) + 1),
            values,
            label=literal(net.label),
            color=colors[net.label],
            linewidth=1.5,
            dashes=_DASHES[net.family],
            marker=_MARKERS[net.family],
            markersize=2.5,
        )
    axes.set_xlim(0, max(len(net.values) for net in nets) + 1)


def _positive(values: Sequence[float]) -> list[float]:
    return [x if np.isfinite(x) and x > 0 else np.nan for x in values]


def _percent(errors: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Means and sample standard deviations in percent; NaN draws no bar."""
    means = [100 * np.mean(runs) for runs in errors]
    stds = [100 * np.std(r, ddof=1) if len(r) > 1 else np.nan for r in errors]
    return np.array(means), np.array(stds)
