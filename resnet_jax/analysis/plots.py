"""Figures of runs, drawn as the paper draws its own.

All take plain data and give a figure, to be saved with ``figure.savefig``. Nets of a
family share a hue, and the deeper is the darker: plain nets are red, residual nets
blue, others green. So nets differ in lightness where there is no colour, and red and
blue are told apart by every eye. Lines over layers and depths differ by family in
style and marker too; lines of errors, whose style tells training from test, bear their
names. Errors are given as shares, 0 to 1, and drawn in percent.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from resnet_jax.errors import UserError

Rows = list[dict[str, Any]]

_TRAIN_COLOR, _TEST_COLOR, _HOLDOUT_COLOR = "#4477aa", "#cc3311", "#228833"


def training_curves(rows: Rows, title: str) -> Figure:
    """Training and test error, and the loss, over the steps (axes of Fig. 6).

    Dashed lines are training, bold ones are test; the learning rate's falls are thin
    vertical lines.

    Args:
      rows: of metrics.jsonl.
      title: over the figure.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    error_axes, loss_axes = figure.subplots(1, 2)
    _draw(error_axes, rows, "error", scale=100)
    _draw(loss_axes, rows, "loss", scale=1)
    error_axes.set_ylabel("error (%)")
    error_axes.set_ylim(0, _upper_limit(rows))
    loss_axes.set_ylabel("loss")
    loss_axes.set_yscale("log")
    for axes in (error_axes, loss_axes):
        axes.set_xlabel("step")
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        for step in _falls(rows):
            axes.axvline(step, color="0.7", linewidth=0.8, zorder=0)
        axes.legend(frameon=False)
    return figure


def _draw(axes: Any, rows: Rows, metric: str, scale: float) -> None:
    styles = {
        "train": {"color": _TRAIN_COLOR, "linestyle": "--", "linewidth": 1.2},
        "holdout": {"color": _HOLDOUT_COLOR, "linewidth": 1.2},
        "test": {"color": _TEST_COLOR, "linewidth": 2.0},
    }
    for split, style in styles.items():
        points = [
            (row["step"], scale * row[f"{split}_{metric}"])
            for row in rows
            if f"{split}_{metric}" in row
        ]
        if points:
            marker = "o" if len(points) == 1 else None
            axes.plot(*zip(*points, strict=True), label=split, marker=marker, **style)


def _upper_limit(rows: Rows) -> float:
    """Shows the paper's 0-20 % where a run gets there, else all of its errors."""
    errors = [
        100 * value
        for row in rows
        for name, value in row.items()
        if name in ("train_error", "test_error", "holdout_error")
    ]
    last = errors[-1]
    return 20.0 if last < 10 else max(1.0, *errors) * 1.05


def _falls(rows: Rows) -> list[int]:
    """Steps of the rows at which a constant learning rate fell by half or more."""
    rates = [row["learning_rate"] for row in rows]
    return [
        row["step"]
        for earlier, before, after, row in zip(
            rates, rates[1:], rates[2:], rows[2:], strict=False
        )
        if earlier == before and after < 0.5 * before
    ]


FAMILIES = ("plain", "residual", "other")
"""Kinds of nets, which the figures tell apart."""

_RAMPS = {
    "plain": LinearSegmentedColormap.from_list(
        "plain", ["#e8833a", "#c92a1a", "#640c0c"]
    ),
    "residual": LinearSegmentedColormap.from_list(
        "residual", ["#5aa5e0", "#1c66b8", "#08204f"]
    ),
    "other": LinearSegmentedColormap.from_list(
        "other", ["#6cbf7b", "#2e8b57", "#0b3d24"]
    ),
}
_DASHES = {"plain": (4, 1.5), "residual": (), "other": (1, 1)}
_MARKERS = {"plain": "s", "residual": "o", "other": "^"}
_LABEL_HEIGHT = 0.055  # of the axes' height, for labels that may stand no closer


@dataclasses.dataclass(frozen=True)
class Curves:
    """The runs of one net: one line, and a band where there are several seeds.

    Attributes:
      label: of the line: "ResNet-56".
      runs: the rows of metrics.jsonl of each run.
      family: one of ``FAMILIES``.
    """

    label: str
    runs: Sequence[Rows]
    family: str = "residual"


@dataclasses.dataclass(frozen=True)
class Layers:
    """A number for each layer of one net.

    Attributes:
      label: of the line.
      values: in the net's order.
      family: one of ``FAMILIES``.
    """

    label: str
    values: Sequence[float]
    family: str = "residual"


@dataclasses.dataclass(frozen=True)
class Depths:
    """The errors of nets that differ in depth alone.

    Attributes:
      label: of the line.
      errors: by depth: the test error of each seed, 0 to 1.
      family: one of ``FAMILIES``.
    """

    label: str
    errors: Mapping[int, Sequence[float]]
    family: str = "residual"


def training_and_test_error(curves: Sequence[Curves], title: str = "") -> Figure:
    """Training error on the left and test error on the right (axes of Fig. 1).

    Lines are means over the seeds and bands reach from the least to the greatest. The
    training error is that of the steps since the row before, with augmentation.

    Args:
      curves: nets in the order of their depth.
      title: over the figure.

    Raises:
      UserError: a net has no run, or its runs have no step in common.
    """
    figure, panels = _figure(title, 2, (10, 4))
    columns = ("train_error", "test_error")
    look = _look(curves)
    for axes, name, label in zip(panels, columns, ("training", "test"), strict=True):
        ends = _draw_errors(axes, curves, look, name, linewidth=2.0)
        _finish_errors(axes, look, ends)
        axes.set_ylabel(f"{label} error (%)")
    return figure


def error_curves(panels: Mapping[str, Sequence[Curves]], title: str = "") -> Figure:
    """Errors over the iterations, panel by panel (axes of Fig. 4 and 6).

    Thin dashed lines are training errors, of the steps since the row before with
    augmentation, and bold ones test errors: means over the seeds, with bands from the
    least to the greatest. The axes are the paper's, errors of 0-20 % or 20-60 % over
    1e4 iterations, where the runs are as long and end there; else they show what there
    is. They are the same in all panels.

    Args:
      panels: by their titles: nets in the order of their depth.
      title: over the figure.

    Raises:
      UserError: a net has no run, or its runs have no step in common.
    """
    figure, all_axes = _figure(title, len(panels), (1 + 4.5 * len(panels), 4.3))
    # A net that stands in several panels has one colour.
    nets = {net.label: net for curves in panels.values() for net in curves}
    look = _look(list(nets.values()))
    for axes, (name, curves) in zip(all_axes, panels.items(), strict=True):
        _draw_errors(axes, curves, look, "train_error", linewidth=1.0, dashes=(4, 2))
        ends = _draw_errors(axes, curves, look, "test_error", linewidth=2.2)
        _finish_errors(axes, look, ends)
        axes.set_title(name, fontsize="medium")
        axes.set_ylabel("error (%)")
    key = [
        Line2D([], [], color="0.2", linewidth=1.0, dashes=(4, 2), label="training"),
        Line2D([], [], color="0.2", linewidth=2.2, label="test"),
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=2, frameon=False)
    return figure


def layer_responses_figure(nets: Sequence[Layers], title: str = "") -> Figure:
    """Standard deviations of layer responses (axes of Fig. 7).

    Top: in the nets' order; bottom: sorted, the greatest first.

    Args:
      nets: of each family in the order of their depth.
      title: over the figure.
    """
    figure, panels = _figure(title, 2, (9, 5.6), rows=True)
    _draw_layers(panels[0], nets, list)
    _draw_layers(panels[1], nets, lambda values: sorted(values, reverse=True))
    for axes, order in zip(panels, ("", ", sorted"), strict=True):
        axes.set_xlabel(f"layer index{order}")
        axes.set_ylabel("standard deviation")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def gradient_norms_figure(
    panels: Mapping[str, Sequence[Layers]], title: str = ""
) -> Figure:
    """Gradient norms layer by layer, on logarithmic axes that are the same in all
    panels.

    Norms of zero, or that are not finite, leave a gap.

    Args:
      panels: by their titles: nets, those of a family in the order of their depth. A
        label means the same in all panels.
      title: over the figure.
    """
    width = 9 if len(panels) == 1 else 2 + 3 * len(panels)
    figure, all_axes = _figure(title, len(panels), (width, 3.8))
    named: dict[str, Any] = {}
    for axes, (name, nets) in zip(all_axes, panels.items(), strict=True):
        axes.sharey(all_axes[0])
        axes.set_yscale("log")
        axes.set_title(name, fontsize="medium")
        _draw_layers(axes, nets, _positive)
        axes.set_xlabel("layer index")
        handles, labels = axes.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True)) | named
    all_axes[0].set_ylabel("norm of the gradient")
    figure.legend(
        named.values(), named.keys(), loc="outside right center", frameon=False
    )
    return figure


def error_by_depth(families: Sequence[Depths], title: str = "") -> Figure:
    """Test errors against depth: means and sample standard deviations over the seeds.

    A single run has no bar.

    Args:
      families: a line each.
      title: over the figure.
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
            label=family.label,
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

    Small dots are the single runs; a single run has no bar.

    Args:
      settings: by name: the test error of each seed, 0 to 1.
      title: over the figure.
    """
    figure, (axes,) = _figure(title, 1, (7, 1.2 + 0.4 * len(settings)))
    color = _RAMPS["residual"](0.5)
    means, deviations = _percent(list(settings.values()))
    places = range(len(settings))
    for place, errors in zip(places, settings.values(), strict=True):
        heights = [place + 0.22] * len(errors)
        axes.plot(
            [100 * error for error in errors],
            heights,
            linestyle="none",
            marker=".",
            markersize=5,
            color="0.45",
        )
    axes.errorbar(
        means, places, xerr=deviations, color=color, fmt="o", capsize=4, linewidth=1.8
    )
    names = [f"{name} (n = {len(errors)})" for name, errors in settings.items()]
    axes.set_yticks(places, labels=names)
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set_xlabel("test error (%)")
    return figure


def _figure(title, count, size, rows=False):
    """A figure with so many panels side by side, or in rows."""
    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title)
    shape = (count, 1) if rows else (1, count)
    panels = list(figure.subplots(*shape, squeeze=False).flat)
    for axes in panels:
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _colors(nets: Iterable[Any]) -> dict[str, Any]:
    """By label: a shade of the net's family, the darker the later it comes."""
    colors: dict[str, Any] = {}
    families: dict[str, list[str]] = {name: [] for name in FAMILIES}
    for net in nets:
        if net.family not in FAMILIES:
            raise UserError(
                f"a family of nets is {', '.join(FAMILIES)}, not {net.family!r}"
            )
        families[net.family].append(net.label)
    if not any(families.values()):
        raise UserError("there is no net to draw")
    for family, labels in families.items():
        shades = (
            np.linspace(0, 1, len(labels)) if len(labels) > 1 else [0.5] * len(labels)
        )
        colors |= {
            label: _RAMPS[family](shade)
            for label, shade in zip(labels, shades, strict=True)
        }
    return colors


class _Look(NamedTuple):
    """What all panels of a figure of errors share.

    Attributes:
      colors: by the nets' labels.
      last_step: where the axis of iterations ends.
      unit: what iterations are counted in: 1e4 as in the paper, or 1e3 or 1.
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
    lasts = [
        _aligned(net, name)[1][:, -1]
        for net in nets
        for name in ("train_error", "test_error")
    ]
    limits = _error_limits(np.concatenate(lasts), is_long=unit == 10_000)
    return _Look(colors, last_step, unit, limits)


def _error_limits(lasts: np.ndarray, is_long: bool) -> tuple[float, float]:
    """The paper's 0-20 % or 20-60 % where runs of its length end there.

    Other axes end at some round number above the runs' last errors.
    """
    if is_long and lasts.min() >= 20 and lasts.max() <= 55:
        return 20, 60
    tops = (20, 40, 60, 80) if is_long else (1, 2, 5, 10, 20, 40, 60, 80)
    return 0, next((top for top in tops if top >= 1.4 * lasts.max()), 100)


def _draw_errors(axes, curves, look, name, linewidth, dashes=()):
    """Draws a line and a band for each net; gives their ends, to be labelled."""
    ends = []
    for net in curves:
        color = look.colors[net.label]
        steps, errors = _aligned(net, name)
        mean, xs = errors.mean(0), steps / look.unit
        axes.plot(
            xs,
            mean,
            color=color,
            linewidth=linewidth,
            dashes=dashes,
            label=net.label,
            marker="o" if len(steps) == 1 else None,
        )
        if len(errors) > 1:
            low, high = errors.min(0), errors.max(0)
            axes.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
        ends.append((net.label, mean[-1], color))
    return ends


def _aligned(net: Curves, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all of a net's runs measured, and errors in percent (runs, steps)."""
    measured = [
        {row["step"]: 100 * row[name] for row in rows if name in row}
        for rows in net.runs
    ]
    steps = sorted(set.intersection(*map(set, measured))) if measured else []
    if not steps:
        raise UserError(f"the runs of {net.label} have no {name} at a common step")
    errors = [[run[step] for step in steps] for run in measured]
    return np.array(steps), np.array(errors)


def _finish_errors(axes, look, ends):
    axes.set_xlim(0, look.last_step / look.unit)
    axes.set_ylim(*look.limits)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    suffix = {1: "", 1000: " (1e3)", 10_000: " (1e4)"}[look.unit]
    axes.set_xlabel(f"iterations{suffix}")
    _label_ends(axes, ends)


def _label_ends(axes: Any, ends: Iterable[tuple[str, float, Any]]) -> None:
    """Writes each line's label right of the axes, at its end's height or near it."""
    to_share = axes.transData + axes.transAxes.inverted()
    wanted = sorted(
        (float(np.clip(to_share.transform((1, value))[1], 0, 1)), label, color)
        for label, value, color in ends
    )
    heights = _apart([height for height, _, _ in wanted], _LABEL_HEIGHT)
    for (_, label, color), height in zip(wanted, heights, strict=True):
        axes.annotate(
            label,
            (1.02, height),
            xycoords="axes fraction",
            color=color,
            verticalalignment="center",
            fontsize=9,
        )


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Ascending heights moved as little as it takes to lie ``least`` apart.

    Those that would touch become a group around the mean of where they want to be.
    """
    groups: list[tuple[float, int]] = []
    for height in heights:
        center, count = height, 1
        while groups:
            below, size = groups[-1]
            if center - below >= least * (count + size) / 2:
                break
            groups.pop()
            center = (center * count + below * size) / (count + size)
            count += size
        groups.append((center, count))
    return [
        center + (index - (count - 1) / 2) * least
        for center, count in groups
        for index in range(count)
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
            label=net.label,
            color=colors[net.label],
            linewidth=1.5,
            dashes=_DASHES[net.family],
            marker=_MARKERS[net.family],
            markersize=2.5,
        )
    axes.set_xlim(0, max(len(net.values) for net in nets) + 1)


def _positive(values):
    values = np.asarray(values, float)
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _percent(errors: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Means and sample standard deviations in percent; nan, no bar, of one run."""
    means = [100 * np.mean(runs) for runs in errors]
    deviations = [
        100 * np.std(runs, ddof=1) if len(runs) > 1 else np.nan for runs in errors
    ]
    return np.array(means), np.array(deviations)
