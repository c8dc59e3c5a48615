"""A sweep: one run for every combination of values, or one per seed."""

import itertools
import math
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
import rich.text

from resnet_jax.analysis import pages
from resnet_jax.analysis.plots import error_by_setting
from resnet_jax.config import Config, load_config
from resnet_jax.console import describe_seconds, make_console, say
from resnet_jax.environment import command_line, environment
from resnet_jax.errors import UserError, printable
from resnet_jax.evaluation.figures import Spread
from resnet_jax.training.runs import (
    Outcome,
    mean_errors,
    members_of,
    train_members,
)
from resnet_jax.training.train import train_one
from resnet_jax.workdir import Workdir

_MOST_COMBINATIONS = 10_000

_ABOUT = (
    "Mean and standard deviation (n - 1) over seeds, each at its last checkpoint on "
    "the whole split. The test set chooses nothing: choose by the held-out error "
    "(data.holdout_examples)."
)


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
      Preempted: a signal stopped a run, and it has saved.
    """
    console = console or make_console()
    points = _points(spec, grid, overrides or {})
    folder = Workdir(workdir)
    members: dict[str, Config] = {}
    for fields, config in points:
        members |= members_of(config, f"{_folder(fields)}/")
    with folder.created():
        outcomes = iter(train_members(members, folder.path, train_one, console))
    rows = [
        _row(fields, list(itertools.islice(outcomes, config.seeds)))
        for fields, config in points
    ]
    content = {
        "grid": {name: list(values) for name, values in grid.items()},
        "points": rows,
        "command": command_line(),
        "environment": environment(),
    }
    folder.write_json("sweep.json", content)
    folder.write(folder.report, _page(spec, rows))
    _print(console, rows)
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
                f"--grid takes FIELD=VALUE,VALUE, such as seed=0,1, not {argument!r}"
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


def _points(
    spec: str, grid: Mapping[str, Sequence[str]], overrides: Mapping[str, str]
) -> list[tuple[dict[str, str], Config]]:
    """The fields of each combination, and their config."""
    if not grid:
        raise UserError("a sweep needs fields with values: --grid FIELD=A,B")
    twice = sorted(set(grid) & set(overrides))
    if twice:
        raise UserError(f"{twice[0]} is both in the grid and overridden; give it once")
    if "seed" in grid or "seeds" in grid:
        raise UserError("seeds do not belong in the grid; give --config.seeds=N")
    if (count := math.prod(map(len, grid.values()))) > _MOST_COMBINATIONS:
        raise UserError(
            f"the grid has {count:,} combinations; give at most {_MOST_COMBINATIONS:,}"
        )
    combinations = itertools.product(*grid.values())
    points = [dict(zip(grid, values, strict=True)) for values in combinations]
    return [(fields, load_config(spec, {**overrides, **fields})) for fields in points]


def _folder(fields: Mapping[str, str]) -> str:
    text = ",".join(f"{name}={value}" for name, value in fields.items())
    return urllib.parse.quote(text, safe="=,.()[] ")


def _row(fields: dict[str, str], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    return {
        "fields": fields,
        "diverged": len(outcomes) - len(results),
        "n": len(results),
        **mean_errors(results),
        "test_errors": [result["test_error"] for result in results],
        "seconds": sum(result["seconds"] for result in results),
    }


def _table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header and the cells of the printed table and the report's."""
    names = {
        "holdout_error": "held-out error (%)",
        "test_error": "test error (%)",
        "train_error": "training error (%)",
    }
    names = {name: text for name, text in names.items() if any(name in r for r in rows)}

    def error(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return ""
        return str(Spread(row[name], row[f"{name}_deviation"], row["n"]))

    header = [*rows[0]["fields"], *names.values(), "n", "diverged", "time"]
    return header, [
        [
            *row["fields"].values(),
            *(error(row, name) for name in names),
            str(row["n"]),
            str(row["diverged"] or ""),
            describe_seconds(row["seconds"]),
        ]
        for row in rows
    ]


def _page(spec: str, rows: Sequence[dict[str, Any]]) -> str:
    errors = {
        _label(row["fields"]): row["test_errors"] for row in rows if row["test_errors"]
    }
    return pages.page(
        f"Sweep of {', '.join(rows[0]['fields'])}",
        pages.paragraph(_ABOUT, "note"),
        pages.grid(*_table(rows)),
        *([pages.svg(error_by_setting(errors))] if errors else []),
        pages.heading("Where it ran"),
        pages.facts({"config": spec, "command": command_line(), **environment()}),
    )


def _label(fields: Mapping[str, str]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]}={x}" for name, x in fields.items())


def _print(console: rich.console.Console, rows: Sequence[dict[str, Any]]) -> None:
    header, lines = _table(rows)
    table = rich.table.Table(*header, box=None, padding=(0, 2, 0, 0))
    for line in lines:
        table.add_row(*(rich.text.Text(printable(cell)) for cell in line))
    console.print()
    console.print(table, highlight=False)
