r"""Writes the report and figure of stored runs of `resnet-jax paper` again.

    python -m benchmarks.paper_report benchmarks/results/figure6_digits_small \
        --figure docs/images/figure6_digits.png

A folder in results/ keeps the result and the rows of each run, and the command in its
results says with which setting. From these, this script makes the workdir that
`resnet-jax paper report` reads, and keeps its report.md.
"""

import argparse
import dataclasses
import json
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console

from resnet_jax.cli import command_parser
from resnet_jax.cli.overrides import parse_overrides
from resnet_jax.paper.experiments import find_experiment
from resnet_jax.paper.report import report
from resnet_jax.paper.sections import Section
from resnet_jax.paper.settings import Setting
from resnet_jax.workdir import Workdir


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="results.jsonl and metrics.jsonl")
    parser.add_argument("--figure", type=Path, help="where to draw the figure, as PNG")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(temporary)
        experiment = restore(options.folder, workdir)
        console = rich.console.Console(quiet=True)
        report(workdir, figures=workdir / "figures", console=console)
        shutil.copyfile(workdir / "report.md", options.folder / "report.md")
        print(options.folder / "report.md")
        if options.figure is not None:
            (drawn,) = workdir.glob(f"figures/*-{experiment}.png")
            shutil.copyfile(drawn, options.figure)
            print(options.figure)


def restore(folder: Path, workdir: Path) -> str:
    """Makes the workdir of stored runs; returns the name of their experiment."""
    results = {run_of(line): line for line in read_lines(folder / "results.jsonl")}
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(folder / "metrics.jsonl"):
        rows.setdefault(run_of(line), []).append(line)
    command = shlex.split(next(iter(results.values()))["command"])
    given, rest = command_parser().parse_known_args(command[command.index("paper") :])
    setting = Setting(given.dataset, given.scale, parse_overrides(rest))
    for run in find_experiment(given.experiment).runs():
        if run.name not in rows:
            continue
        (config,) = setting.members(run, seeds=1).values()
        section = workdir / setting.section(config)
        Section.note(section, setting, given.experiment)
        here = Workdir(section / run.name / f"seed-{config.seed}")
        here.create()
        here.write_config(dataclasses.replace(config, seeds=1), shlex.join(command))
        # The oldest rows lack their seconds, which no report shows.
        here.write_rows([{"seconds": 0.0} | row for row in rows[run.name]])
        if run.name in results:
            here.write_result(results[run.name])
    return given.experiment


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line."""
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def run_of(line: dict[str, Any]) -> str:
    """The run that a stored line belongs to; older lines name its net alone."""
    return line.pop("run", None) or line["model"]


if __name__ == "__main__":
    main()
