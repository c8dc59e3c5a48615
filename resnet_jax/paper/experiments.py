"""All experiments, by name."""

import textwrap
from collections.abc import Sequence

import rich.console

from resnet_jax.console import say
from resnet_jax.errors import UserError, nearest
from resnet_jax.paper import imagenet, small_images
from resnet_jax.paper.detection import DETECTION_TABLES, SOURCE, DetectionTable
from resnet_jax.paper.entries import Experiment, PaperRun, Table

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (*small_images.EXPERIMENTS, *imagenet.EXPERIMENTS)
}

DETECTION: dict[str, DetectionTable] = {table.name: table for table in DETECTION_TABLES}

ELSEWHERE = {
    "Table 1": "resnet-jax summary resnet18_a resnet34_a resnet50_v1 resnet101_v1 "
    "resnet152_v1",
    "Figure 2": "ResidualBlock in resnet_jax/models/blocks.py",
    "Figure 3": "resnet-jax summary vgg19 plain34 resnet34_a",
    "Figure 5": "resnet-jax summary resnet34_a resnet50_v1 --blocks",
}
"""The paper's other tables and figures, and where they are."""


def find_experiment(name: str) -> Experiment:
    """The experiment with a name.

    Raises:
      UserError: the name is unknown, or of a table of detectors.
    """
    if name in DETECTION:
        raise UserError(
            f"{name} is of detectors, which are no experiment: train one with "
            "resnet-jax detect train"
        )
    if name not in EXPERIMENTS:
        raise UserError(f"unknown experiment {name!r}; {nearest(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]


def choose_runs(experiment: Experiment, only: Sequence[str] = ()) -> list[PaperRun]:
    """The runs of an experiment: all, or only those with the given names.

    Raises:
      UserError: no run of the experiment has that name.
    """
    runs = {run.name: run for run in experiment.runs()}
    for name in only:
        if name not in runs:
            hint = nearest(name, runs)
            raise UserError(f"{experiment.name} has no run {name!r}; {hint}")
    return [run for name, run in runs.items() if not only or name in only]


def print_experiments(console: rich.console.Console | None = None) -> None:
    """Prints experiments with their runs, tables of detectors, and ``ELSEWHERE``."""
    console = console or rich.console.Console()
    wrapper = textwrap.TextWrapper(
        width=88,
        initial_indent="    ",
        subsequent_indent="      ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    for experiment in EXPERIMENTS.values():
        runs = ", ".join(
            f"{run.name} ({seeds} seeds)" if seeds > 1 else run.name
            for run in experiment.runs()
            for seeds in (experiment.seeds_of(run),)
        )
        say(console, f"{experiment.name}: {experiment.title}")
        say(console, f"    {experiment.source}")
        say(console, wrapper.fill(f"runs: {runs}"))
    for table in DETECTION.values():
        say(console, f"{table.name}: {table.title}")
        say(console, f"    {SOURCE}")
        say(console, wrapper.fill(f"published, in percent: {table.protocol}"))
        for line in aligned(table.table):
            say(console, f"    {line}")
    say(console, "Other tables and figures")
    for name, where in ELSEWHERE.items():
        say(console, f"    {name}: {where}")


def aligned(table: Table) -> list[str]:
    """A table as lines of text, with the first column on the left."""
    lines = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
