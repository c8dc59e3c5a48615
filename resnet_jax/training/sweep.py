"""A sweep: one run for every combination of values, or one per seed."""

import itertools
import json
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from resnet_jax.analysis import pages
from resnet_jax.analysis.plots import error_by_setting
from resnet_jax.config import Config, load_config
from resnet_jax.console import describe_seconds, make_console, say
from resnet_jax.environment import command_line, environment
from resnet_jax.errors import UserError
from resnet_jax.training.runs import Outcome, Spread, members_of, train_members
from resnet_jax.training.train import train_one
from resnet_jax.workdir import Workdir

_ABOUT = (
    "Mean and standard deviation (n - 1) over seeds, each at its last checkpoint on "
    "the whole split. The test set chooses nothing: choose by the held-out error "
    "(data.holdout_examples)."
)

Point = tuple[str, ...]


def sweep(
    spec: str,
    grid: Mapping[str, Sequence[str]],
    workdir: str | os.PathLike[str],
    *,
    overrides: Mapping[str, str] | None = None,
    console: rich.console.Console | None = None,
) -> list[dict[str, Any]]:
    """Trains every combination of values and tabulates the errors.

    The runs are in ``workdir/FIELD=VALUE,.../seed-N``. The same call continues where it
    stopped, and a larger grid keeps the finished runs. The results are in sweep.json
    and report.html.

    Args:
      spec: a config file, see ``load_config``.
      grid: dotted field names to their values, as text.
      workdir: of all runs.
      overrides: of other fields, such as ``seeds``.
      console: where to print; standard output by default.

    Returns:
      For each combination its fields, errors, deviations and number of seeds.

    Raises:
      UserError: a wrong field or value, which is found before anything runs, or a
        fault in data or folder.
      Preempted: SIGTERM stopped a run, and it has saved.
    """
    console = console or make_console()
    configs = _configs(spec, grid, overrides or {})
    folder = Workdir(workdir)
    folder.create()
    members = {
        point: members_of(config, f"{_folder(grid, point)}/")
        for point, config in configs.items()
    }
    outcomes = train_members(
        list(itertools.chain(*members.values())), folder.path, train_one, console
    )
    ended = iter(outcomes)
    rows = [
        _row(grid, point, list(itertools.islice(ended, len(runs))))
        for point, runs in members.items()
    ]
    content = {
        "grid": {name: list(values) for name, values in grid.items()},
        "points": rows,
        "command": command_line(),
        "environment": environment(),
    }
    folder.write(folder.path / "sweep.json", json.dumps(content, indent=2) + "\n")
    folder.write(folder.report, _page(spec, grid, rows))
    _print(console, grid, rows)
    say(console, f"report: {folder.report}")
    return rows


def parse_grid(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Parses ``FIELD=VALUE,VALUE``; commas inside brackets belong to a value.

    Raises:
      UserError: an argument has another form.
    """
    grid = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        values = [value.strip() for value in _split(text)]
        if not (equals and name and all(values)):
            raise UserError(
                f"--grid is FIELD=VALUE,VALUE, such as "
                f"optimizer.learning_rate=0.05,0.1, not {argument!r}"
            )
        if name in grid or len(set(values)) < len(values):
            raise UserError(f"--grid {argument} names a field or a value twice")
        grid[name] = values
    return grid


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _configs(
    spec: str, grid: Mapping[str, Sequence[str]], overrides: Mapping[str, str]
) -> dict[Point, Config]:
    if not grid:
        raise UserError("a sweep needs fields with values: --grid FIELD=A,B")
    twice = sorted(set(grid) & set(overrides))
    if twice:
        raise UserError(f"{twice[0]} is both in the grid and overridden; give it once")
    if "seed" in grid or "seeds" in grid:
        raise UserError("seeds do not belong in the grid; give --config.seeds=N")
    return {
        point: load_config(spec, {**overrides, **dict(zip(grid, point, strict=True))})
        for point in itertools.product(*grid.values())
    }


def _folder(grid: Mapping[str, Any], point: Point) -> str:
    text = ",".join(f"{name}={value}" for name, value in zip(grid, point, strict=True))
    return urllib.parse.quote(text, safe="=,.()[] ")


def _row(
    grid: Mapping[str, Any], point: Point, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    row: dict[str, Any] = {"fields": dict(zip(grid, point, strict=True))}
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    row["diverged"] = len(outcomes) - len(results)
    row["n"] = len(results)
    for metric in ("holdout_error", "test_error", "train_error"):
        values = [result[metric] for result in results if metric in result]
        if values:
            spread = Spread.of(values)
            row |= {metric: spread.mean, f"{metric}_deviation": spread.deviation}
    row["test_errors"] = [result["test_error"] for result in results]
    row["seconds"] = sum(result["seconds"] for result in results)
    return row


def _table(
    grid: Mapping[str, Any], rows: Sequence[dict[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    metrics = [
        metric
        for metric in ("holdout_error", "test_error", "train_error")
        if any(metric in row for row in rows)
    ]
    names = {
        "holdout_error": "held-out error (%)",
        "test_error": "test error (%)",
        "train_error": "training error (%)",
    }
    header = [*grid, *(names[metric] for metric in metrics), "n", "diverged", "time"]
    return header, [
        [
            *row["fields"].values(),
            *(_percent(row, metric) for metric in metrics),
            str(row["n"]),
            str(row["diverged"] or ""),
            describe_seconds(row["seconds"]),
        ]
        for row in rows
    ]


def _percent(row: dict[str, Any], metric: str) -> str:
    if metric not in row:
        return ""
    deviation = row[f"{metric}_deviation"]
    spread = "" if deviation is None else f" \u00b1 {100 * deviation:.2f}"
    return f"{100 * row[metric]:.2f}{spread}"


def _page(spec: str, grid: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    errors = {
        _label(row["fields"]): row["test_errors"] for row in rows if row["test_errors"]
    }
    return pages.page(
        f"Sweep of {', '.join(grid)}",
        pages.paragraph(_ABOUT, "note"),
        pages.grid(*_table(grid, rows)),
        *([pages.svg(error_by_setting(errors))] if errors else []),
        pages.heading("Where it ran"),
        pages.facts({"config": spec, "command": command_line(), **environment()}),
    )


def _label(fields: Mapping[str, str]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]}={x}" for name, x in fields.items())


def _print(
    console: rich.console.Console,
    grid: Mapping[str, Any],
    rows: Sequence[dict[str, Any]],
) -> None:
    header, lines = _table(grid, rows)
    table = rich.table.Table(box=None, padding=(0, 2, 0, 0))
    for name in header:
        table.add_column(name)
    for line in lines:
        table.add_row(*line)
    console.print()
    console.print(table, highlight=False)
