"""Published and measured numbers of all experiments, as a page and as Markdown."""

import os
import re
from collections.abc import Sequence
from typing import Any

import rich.console

from resnet_jax.analysis import pages
from resnet_jax.analysis.plots import check_file, save
from resnet_jax.config import flatten
from resnet_jax.console import say
from resnet_jax.errors import UserError, printable
from resnet_jax.paper.entries import Experiment
from resnet_jax.paper.experiments import EXPERIMENTS, find_experiment
from resnet_jax.paper.figures import draw
from resnet_jax.paper.sections import Measured, Section
from resnet_jax.paper.settings import Setting
from resnet_jax.paper.tables import VIEWS, Table, tables
from resnet_jax.storage import expand
from resnet_jax.workdir import Workdir

_TITLE = "Deep residual learning: published and measured"
_ABOUT = (
    "Published: from the source of each table. Measured: mean and sample standard "
    "deviation (n - 1) over n seeds, on the whole test set at the last checkpoint. "
    "No choice used the test set. The two stand side by side only where data and "
    "length of training are the published ones."
)


def report(
    workdir: str | os.PathLike[str],
    *,
    only: Sequence[str] = (),
    figures: str | os.PathLike[str] | None = None,
    console: rich.console.Console | None = None,
) -> None:
    """Writes report.html and report.md of the experiments in a folder.

    Args:
      workdir: the workdir of ``run_experiment``.
      only: names of experiments; by default all that were run.
      figures: folder to which figures are also written, as PNG files.
      console: where to print; standard output by default.

    Raises:
      UserError: the folder holds no experiment, or a file cannot be written.
    """
    console = console or rich.console.Console()
    if figures is not None:
        check_file(expand(figures) / "experiment.png")
    folder = Workdir(workdir)
    paths = sorted(folder.path.iterdir()) if folder.path.is_dir() else []
    read = [Section.read(path) for path in paths if path.is_dir()]
    sections = [section for section in read if section is not None]
    if not sections:
        raise UserError(
            f"{folder.path} holds no experiment; run one with resnet-jax paper run"
        )
    wanted = [find_experiment(name).name for name in only]
    html, markdown = [pages.paragraph(_ABOUT, "note")], [f"# {_TITLE}", _ABOUT]
    for section in sections:
        title = f"{section.path.name} ({section.describe()})"
        html.append(pages.heading(title))
        markdown.append(f"## {_plain(title)}")
        for experiment in _of_section(section, wanted):
            measured = section.measured(experiment)
            found = tables(experiment, section, measured)
            remarks = _remarks(measured) if experiment.trains else []
            figure = draw(experiment, section, measured)
            html += _html(experiment, found, remarks, figure)
            markdown += _markdown(experiment, found, remarks)
            if figures is not None and figure is not None:
                name = f"{section.path.name}-{experiment.name}.png"
                say(console, f"figure: {save(figure, expand(figures) / name)}")
    folder.write(folder.report, pages.page(_TITLE, *html))
    text = folder.path / "report.md"
    folder.write(text, "\n\n".join(markdown) + "\n")
    say(console, f"report: {folder.report} and {text}")


def _of_section(section: Section, wanted: Sequence[str]) -> list[Experiment]:
    """The wanted experiments; by default those run here, and those complete anyway."""
    if wanted:
        return [EXPERIMENTS[name] for name in wanted]
    return [
        experiment
        for name, experiment in EXPERIMENTS.items()
        if name in section.experiments or _is_complete(section, experiment)
    ]


def _is_complete(section: Section, experiment: Experiment) -> bool:
    runs = experiment.runs()
    is_table = not experiment.analysis or experiment.analysis in VIEWS
    return bool(runs and experiment.trains and is_table) and all(
        any(outcome.result for outcome in section.outcomes(run)) for run in runs
    )


def _remarks(measured: Sequence[Measured]) -> list[str]:
    """Rows that were not measured, or not as published."""
    missing = [
        item.entry.label for item in measured if item.entry.run and not item.outcomes
    ]
    found = [f"not measured: {', '.join(missing)}"] if missing else []
    found += [sentence for item in measured for sentence in item.shortcomings]
    by_difference: dict[str, list[str]] = {}
    for item in measured:
        differences = ", ".join(_differences(item))
        if differences:
            by_difference.setdefault(differences, []).append(item.entry.label)
    return found + [
        f"{', '.join(labels)}: with {differences}"
        for differences, labels in by_difference.items()
    ]


def _differences(measured: Measured) -> list[str]:
    """Fields in which finished runs differ from the published recipe."""
    run = measured.entry.run
    if run is None or not measured.results:
        return []
    recipe = flatten(Setting().config(run))
    found = []
    for outcome in measured.outcomes:
        config = outcome.workdir.read_config()
        if outcome.result is None or config is None:
            continue
        found += [
            f"{name}={value} (published: {recipe[name]})"
            for name, value in flatten(config).items()
            if value != recipe[name] and name not in _NO_DIFFERENCE
        ]
    return list(dict.fromkeys(found))


_NO_DIFFERENCE = {
    *("seed", "seeds", "compilation_cache", "data.path", "data.data_dir"),
    *("training.log_every_steps", "evaluation.every_steps", "evaluation.batch_size"),
    "checkpoint.every_steps",
}
"""Fields that may differ from the recipe without a remark."""


_REMARKS = "Not measured, or not as published"


def _html(
    experiment: Experiment, found: list[Table], remarks: list[str], figure: Any | None
) -> list[str]:
    parts = [
        pages.heading(experiment.title, 3),
        pages.paragraph(f"{experiment.source}. {experiment.shows}"),
        pages.paragraph(experiment.protocol, "note"),
    ]
    if figure is not None:
        parts.append(pages.svg(figure))
    for table in found:
        if table.title:
            parts.append(pages.heading(table.title, 4))
        if table.note:
            parts.append(pages.paragraph(table.note, "note"))
        parts.append(pages.grid(table.header, table.rows))
    if remarks:
        parts.append(pages.heading(_REMARKS, 4))
        parts += [pages.paragraph(sentence, "note") for sentence in remarks]
    return parts


def _markdown(
    experiment: Experiment, found: list[Table], remarks: list[str]
) -> list[str]:
    parts = [
        f"### {experiment.title}",
        f"{experiment.source}. {experiment.shows}",
        experiment.protocol,
    ]
    for table in found:
        if table.title:
            parts.append(f"#### {_plain(table.title)}")
        if table.note:
            parts.append(_plain(table.note))
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        cells = [" | ".join(map(_plain, line)) for line in lines]
        parts.append("\n".join(f"| {line} |" for line in cells))
    if remarks:
        listed = "\n".join(f"- {_plain(sentence)}" for sentence in remarks)
        parts.append(f"{_REMARKS}:\n\n{listed}")
    return parts


def _plain(text: str) -> str:
    """Text in one line of Markdown, where it starts no cell and no HTML."""
    line = " ".join(printable(text).split())
    return re.sub(r"[\\|<]", r"\\\g<0>", line)
