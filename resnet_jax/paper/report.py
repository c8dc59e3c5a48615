"""Published and measured numbers of all experiments, as a page and as Markdown."""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import rich.console

from resnet_jax.analysis import pages
from resnet_jax.analysis.plots import check_file, save
from resnet_jax.config import flatten
from resnet_jax.console import say
from resnet_jax.errors import UserError, printable
from resnet_jax.paper.detection import SOURCE
from resnet_jax.paper.detectors import (
    NOT_MEASURED,
    NOTE,
    Tested,
    measured_tables,
    read_tested,
    summary,
)
from resnet_jax.paper.entries import Experiment, Table
from resnet_jax.paper.experiments import DETECTION, EXPERIMENTS, find_experiment
from resnet_jax.paper.figures import draw
from resnet_jax.paper.sections import Measured, Section
from resnet_jax.paper.settings import Setting
from resnet_jax.paper.tables import VIEWS, tables
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
      workdir: the workdir of ``run_experiment``; its folder ``detection`` may hold
        runs of ``resnet-jax detect train``.
      only: names of experiments, or of tables of detectors; by default all that were
        run.
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
    tested = read_tested(folder.path)
    if not sections and not tested:
        raise UserError(
            f"{folder.path} holds no experiment; run one with resnet-jax paper run"
        )
    for name in only:
        if name not in DETECTION:
            find_experiment(name)
    html, markdown = [pages.paragraph(_ABOUT, "note")], [f"# {_TITLE}", _ABOUT]
    for title, parts in _chapters(sections, tested, only):
        html.append(pages.heading(title))
        markdown.append(f"## {_plain(title)}")
        for part in parts:
            html += _html(part)
            markdown += _markdown(part)
            if figures is not None and part.figure is not None:
                name = f"{part.file}.png"
                say(console, f"figure: {save(part.figure, expand(figures) / name)}")
    folder.write(folder.report, pages.page(_TITLE, *html))
    text = folder.path / "report.md"
    folder.write(text, "\n\n".join(markdown) + "\n")
    say(console, f"report: {folder.report} and {text}")


@dataclasses.dataclass(frozen=True)
class _Part:
    """An experiment, or a table of detectors, as the report shows it.

    Attributes:
      title: its heading.
      about: its source and finding.
      protocol: how its numbers were measured.
      tables: published and measured.
      remarks: what is missing or differs.
      figure: drawn above the tables, or None.
      file: name of the figure's file, without its suffix.
    """

    title: str
    about: str
    protocol: str
    tables: Sequence[Table]
    remarks: Sequence[str] = ()
    figure: Any | None = None
    file: str = ""


def _chapters(
    sections: Sequence[Section], tested: Sequence[Tested], only: Sequence[str]
) -> Iterator[tuple[str, list[_Part]]]:
    """The title and the parts of each chapter: data sets, then detectors."""
    tables_wanted = [name for name in only if name in DETECTION]
    wanted = [name for name in only if name not in DETECTION]
    if wanted or not only:
        for section in sections:
            title = f"{section.path.name} ({section.describe()})"
            chosen = _of_section(section, wanted)
            yield title, [_experiment(section, each) for each in chosen]
    if tables_wanted or not only:
        parts = _detectors(tested, tables_wanted)
        if parts:
            yield "Detection", parts


def _experiment(section: Section, experiment: Experiment) -> _Part:
    measured = section.measured(experiment)
    return _Part(
        title=experiment.title,
        about=f"{experiment.source}. {experiment.shows}",
        protocol=experiment.protocol,
        tables=tables(experiment, section, measured),
        remarks=_remarks(measured) if experiment.trains else [],
        figure=draw(experiment, section, measured),
        file=f"{section.path.name}-{experiment.name}",
    )


def _detectors(tested: Sequence[Tested], wanted: Sequence[str]) -> list[_Part]:
    """The wanted tables of detectors, with those tested here below each.

    By default the tables whose data some detector was tested on; detectors tested on
    other data come last.
    """
    parts = []
    for name, table in DETECTION.items():
        measured = measured_tables(table, tested)
        if name in wanted or (measured and not wanted):
            published = dataclasses.replace(table.table, title="Published (%)")
            missing = [] if measured else [NOT_MEASURED]
            about = f"{SOURCE}. {table.shows}"
            found = [published, *measured]
            parts.append(_Part(table.title, about, table.protocol, found, missing))
    others = [run for run in tested if run.benchmark is None]
    if others and not wanted:
        parts.append(
            _Part(
                title="Detectors on other data",
                about="Not published in the paper.",
                protocol=NOTE,
                tables=[dataclasses.replace(summary(others), note="")],
            )
        )
    return parts


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


def _html(part: _Part) -> list[str]:
    parts = [
        pages.heading(part.title, 3),
        pages.paragraph(part.about),
        pages.paragraph(part.protocol, "note"),
    ]
    if part.figure is not None:
        parts.append(pages.svg(part.figure))
    for table in part.tables:
        if table.title:
            parts.append(pages.heading(table.title, 4))
        if table.note:
            parts.append(pages.paragraph(table.note, "note"))
        parts.append(pages.grid(table.header, table.rows))
    if part.remarks:
        parts.append(pages.heading(_REMARKS, 4))
        parts += [pages.paragraph(sentence, "note") for sentence in part.remarks]
    return parts


def _markdown(part: _Part) -> list[str]:
    parts = [f"### {part.title}", part.about, part.protocol]
    for table in part.tables:
        if table.title:
            parts.append(f"#### {_plain(table.title)}")
        if table.note:
            parts.append(_plain(table.note))
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        cells = [" | ".join(map(_plain, line)) for line in lines]
        parts.append("\n".join(f"| {line} |" for line in cells))
    if part.remarks:
        listed = "\n".join(f"- {_plain(sentence)}" for sentence in part.remarks)
        parts.append(f"{_REMARKS}:\n\n{listed}")
    return parts


def _plain(text: str) -> str:
    """Text in one line of Markdown, where it starts no cell and no HTML."""
    line = " ".join(printable(text).split())
    return re.sub(r"[\\|<]", r"\\\g<0>", line)
