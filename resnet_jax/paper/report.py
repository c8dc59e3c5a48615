"""Published and measured numbers of all experiments, as a page and as Markdown."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console

from resnet_jax.analysis import pages
from resnet_jax.config import flatten
from resnet_jax.console import describe_seconds, say
from resnet_jax.errors import UserError
from resnet_jax.paper.entries import Experiment, Published
from resnet_jax.paper.experiments import EXPERIMENTS, find_experiment
from resnet_jax.paper.figures import draw
from resnet_jax.paper.sections import (
    Measured,
    Section,
    describe_scale,
    read_experiment,
)
from resnet_jax.paper.settings import Setting
from resnet_jax.workdir import Workdir

HEADER = (
    "",
    "published (%)",
    "measured (%)",
    "deviation",
    "n",
    "training error (%)",
    "checkpoint",
    "data",
    "hardware",
    "time a run",
)
"""Columns of a table. Errors are of the test set but for the training error; measured
is the mean over n seeds, and the deviation is that of a sample."""

DEEPENED_HEADER = (
    "",
    "blocks",
    "test error (%)",
    "blocks with identities",
    "test error (%)",
    "seed",
)
"""Columns for trained nets deepened by identity layers."""

Table = tuple[Sequence[str], Sequence[Sequence[str]]]

_ABOUT = (
    "Published: as in the source of each table. Measured: here, mean and standard "
    "deviation (n - 1) over n seeds, each at its last checkpoint on the whole test "
    "set, which chose nothing."
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
      workdir: of ``run_experiment``.
      only: names of experiments; all that were run by default.
      figures: a folder for the figures as PNG files.
      console: where to print; standard output by default.

    Raises:
      UserError: there is no experiment, or a file cannot be written.
    """
    console = console or rich.console.Console()
    folder = Workdir(workdir)
    sections = _sections(folder.path)
    if not sections:
        raise UserError(
            f"{folder.path} holds no experiment; run one with resnet-jax paper run"
        )
    wanted = [find_experiment(name).name for name in only]
    html, markdown = [pages.paragraph(_ABOUT, "note")], [f"# {_TITLE}", _ABOUT]
    for section in sections:
        title = _section_title(section)
        html.append(pages.heading(title))
        markdown.append(f"## {title}")
        for experiment in _of_section(section, wanted):
            measured = read_experiment(section, experiment)
            table = [_row(item, section) for item in measured]
            missing = _missing(experiment, measured)
            tables: list[Table] = [(HEADER, table)] if experiment.trains else []
            if experiment.analysis == "deepened":
                tables.append((DEEPENED_HEADER, _deepened(experiment, section)))
            figure = draw(experiment, section, measured)
            html += _html(experiment, tables, missing, figure)
            markdown += _markdown(experiment, tables, missing)
            if figures is not None and figure is not None:
                path = Path(figures) / f"{section.path.name}-{experiment.name}.png"
                _save(figure, path)
                say(console, f"figure: {path}")
    folder.write(folder.report, pages.page(_TITLE, *html))
    text = folder.path / "report.md"
    folder.write(text, "\n\n".join(markdown) + "\n")
    say(console, f"report: {folder.report} and {text}")


_TITLE = "Deep residual learning: published and measured"


def _sections(folder: Path) -> list[Section]:
    if not folder.is_dir():
        return []
    found = [Section(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    return [section for section in found if section.exists]


def _of_section(section: Section, wanted: Sequence[str]) -> list[Experiment]:
    """Those that were asked for, and those that have come with them whole."""
    if wanted:
        return [EXPERIMENTS[name] for name in wanted]
    return [
        experiment
        for name, experiment in EXPERIMENTS.items()
        if name in section.experiments or _is_whole(section, experiment)
    ]


def _is_whole(section: Section, experiment: Experiment) -> bool:
    runs = experiment.runs()
    return bool(runs and experiment.trains and not experiment.analysis) and all(
        any(outcome.result for outcome in section.outcomes(run)) for run in runs
    )


def _section_title(section: Section) -> str:
    return f"{section.path.name} ({describe_scale(section.setting)})"


def _row(measured: Measured, section: Section) -> list[str]:
    published = str(measured.entry.published or Published())
    if measured.entry.published is not None and measured.entry.published.note:
        published = f"{published} ({measured.entry.published.note})".strip()
    test, train = measured.spread("test_error"), measured.spread("train_error")
    if test is None or train is None:
        blank = "not measured" if measured.entry.run is not None else ""
        return [measured.entry.label, published, blank, *[""] * (len(HEADER) - 3)]
    first = measured.results[0]
    seconds = [result["seconds"] for result in measured.results]
    return [
        measured.entry.label,
        published,
        f"{100 * test.mean:.2f}",
        "" if test.deviation is None else f"{100 * test.deviation:.2f}",
        str(test.count),
        f"{100 * train.mean:.2f}",
        f"last, step {first['step']:,}",
        first["data"],
        _hardware(measured.results),
        describe_seconds(sum(seconds) / len(seconds)),
    ]


def _deepened(experiment: Experiment, section: Section) -> list[list[str]]:
    """A row for each net that was deepened."""
    rows = []
    for entry in experiment.entries:
        if entry.run is None:
            continue
        for outcome in section.outcomes(entry.run):
            found = section.analysis("deepened", entry.run, outcome.seed)
            if found is None:
                continue
            before, after = (
                f"{100 * found[f'errors_{when}'] / found['count']:.2f} "
                f"({found[f'errors_{when}']} of {found['count']})"
                for when in ("before", "after")
            )
            blocks = str(found["blocks_before"]), str(found["blocks_after"])
            rows.append(
                [entry.label, blocks[0], before, blocks[1], after, str(outcome.seed)]
            )
    return rows


def _hardware(results: Sequence[dict[str, Any]]) -> str:
    names = []
    for result in results:
        where = result["environment"]
        on_cpu = where["devices"].endswith("cpu")
        cores = f"{where['cpu_cores']} cores, {where['cpu']}"
        names.append(cores if on_cpu else where["devices"])
    return "; ".join(dict.fromkeys(names))


def _missing(experiment: Experiment, measured: Sequence[Measured]) -> list[str]:
    """What is not measured, and what was measured otherwise than published."""
    if not experiment.trains:
        return []
    never = [item.entry.label for item in measured if item.is_missing]
    said = [f"not measured: {', '.join(never)}"] if never else []
    said += [sentence for item in measured for sentence in item.shortcomings]
    by_difference: dict[str, list[str]] = {}
    for item in measured:
        differences = ", ".join(_differences(item))
        if differences:
            by_difference.setdefault(differences, []).append(item.entry.label)
    said += [
        f"{', '.join(labels)}: with {differences}"
        for differences, labels in by_difference.items()
    ]
    return said


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
    "seed",
    "seeds",
    "compilation_cache",
    "training.log_every_steps",
    "evaluation.every_steps",
    "evaluation.batch_size",
    "checkpoint.every_steps",
    "data.path",
    "data.data_dir",
}


def _html(
    experiment: Experiment,
    tables: Sequence[Table],
    missing: Sequence[str],
    figure: Any | None,
) -> list[str]:
    parts = [
        pages.heading(experiment.title, 3),
        pages.paragraph(f"{experiment.source}. {experiment.shows}"),
        pages.paragraph(experiment.protocol, "note"),
    ]
    if figure is not None:
        parts.append(pages.svg(figure))
    parts += [pages.grid(header, rows) for header, rows in tables]
    if missing:
        parts.append(pages.heading("Not measured, or otherwise than published", 4))
        parts += [pages.paragraph(sentence, "note") for sentence in missing]
    return parts


def _markdown(
    experiment: Experiment, tables: Sequence[Table], missing: Sequence[str]
) -> list[str]:
    parts = [
        f"### {experiment.title}",
        f"{experiment.source}. {experiment.shows}",
        experiment.protocol,
    ]
    for header, rows in tables:
        lines = [header, ["---"] * len(header), *rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if missing:
        listed = "\n".join(f"- {sentence}" for sentence in missing)
        parts.append(f"Not measured, or otherwise than published:\n\n{listed}")
    return parts


def _save(figure: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise UserError(f"figure {path} cannot be written: {error}") from error
