"""Figures of runs, drawn as the paper draws its own."""

from typing import Any

from matplotlib.figure import Figure

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
