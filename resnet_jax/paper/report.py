"""Published and measured numbers of all experiments, as a page and as Markdown."""

import os
import re
import statistics
from collections.abc import Sequence
from typing import Any

import rich.console

from resnet_jax.analysis import pages
from resnet_jax.analysis.plots import check_file, save
from resnet_jax.config import flatten
from resnet_jax.console import describe_seconds, say
from resnet_jax.errors import UserError, printable
from resnet_jax.paper.entries import Experiment, Published
from resnet_jax.paper.experiments import EXPERIMENTS, find_experiment
from resnet_jax.paper.figures import draw
from resnet_jax.paper.sections import Measured, Section
from resnet_jax.paper.settings import Setting
from resnet_jax.storage import expand
from resnet_jax.workdir import Workdir

HEADER = (
    "",
    "published (%)",
    "measured (%)",
    "deviation",
    "measured, {views} (%)",
    "published top-5 (%)",
    "measured top-5 (%)",
    "measured top-5, {views} (%)",
    "n",
    "training error (%)",
    "checkpoint",
    "data",
    "hardware",
    "time per run",
)
"""Columns of a table. Errors are test errors unless they say training; measured is the
mean over n seeds, and deviation the sample standard deviation. Only tables with
published top-5 errors have columns for them, and only those whose nets are tested with
several views per image have columns for that."""

VIEWS = {"ten_crop": "10-crop", "multi_scale": "several scales"}
"""Analyses that test a net with several views per image."""

ENSEMBLE_HEADER = ("ensemble", "nets", "test error (%)", "test top-5 error (%)")
"""Columns for nets that answer together."""

DEEPENED_HEADER = (
    "",
    "blocks",
    "test error (%)",
    "blocks with identities",
    "test error (%)",
    "seed",
)
"""Columns for trained nets deepened by identity layers."""

LAYERS_HEADER = ("layers", "first", "last", "smallest", "mean", "largest")
"""Columns for the values of a net's layers; the first column names what they are."""

_QUANTITIES = {
    "responses": "standard deviation of responses",
    "gradients": "gradient norm",
}

Table = tuple[Sequence[str], Sequence[Sequence[str]]]

_TITLE = "Deep residual learning: published and measured"
_ABOUT = (
    "Published: from the source of each table. Measured: mean and sample standard "
    "deviation (n - 1) over n seeds, on the whole test set at the last checkpoint. "
    "No choice used the test set."
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
    sections = [
        found for path in paths if path.is_dir() and (found := Section.read(path))
    ]
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
            tables = _tables(experiment, section, measured)
            remarks = _remarks(measured) if experiment.trains else []
            figure = draw(experiment, section, measured)
            html += _html(experiment, tables, remarks, figure)
            markdown += _markdown(experiment, tables, remarks)
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


def _tables(
    experiment: Experiment, section: Section, measured: Sequence[Measured]
) -> list[Table]:
    """The experiment's tables: errors, and what its analysis found."""
    tables: list[Table] = []
    if experiment.trains:
        tables.append(_errors(experiment, section, measured))
    if experiment.analysis == "deepened":
        tables.append((DEEPENED_HEADER, _deepened(experiment, section)))
    if experiment.analysis == "ensemble":
        tables.append((ENSEMBLE_HEADER, _ensemble(experiment, section)))
    if experiment.analysis in _QUANTITIES:
        tables.append(_layers(experiment.analysis, section, measured))
    return tables


def _errors(
    experiment: Experiment, section: Section, measured: Sequence[Measured]
) -> Table:
    """The table of published and measured errors."""
    views = VIEWS.get(str(experiment.analysis), "")
    rows = []
    for item in measured:
        found = (
            section.analysis(str(experiment.analysis), item.entry.run, outcome.seed)
            for outcome in item.outcomes
        )
        rows.append(_row(item, [each for each in found if each] if views else []))
    published = [item.entry.published for item in measured]
    has_top5 = any(each is not None and each.top5 is not None for each in published)
    kept = [
        i
        for i, name in enumerate(HEADER)
        if (has_top5 or "top-5" not in name) and (views or "{views}" not in name)
    ]
    header = [HEADER[i].format(views=views) for i in kept]
    return header, [[row[i] for i in kept] for row in rows]


def _row(measured: Measured, tested: Sequence[dict[str, Any]]) -> list[str]:
    """All cells of a row; ``tested`` are its results with several views, by seed."""
    entry, results = measured.entry, measured.results
    published = entry.published or Published()
    blank = "not measured" if entry.run is not None else ""
    test, train = measured.spread("test_error"), measured.spread("train_error")
    cells = [
        entry.label,
        str(published),
        f"{100 * test.mean:.2f}" if test else blank,
        f"{100 * test.deviation:.2f}" if test and test.deviation is not None else "",
        _mean(tested, "error", len(results)) or blank,
        published.top5_text,
        _mean(results, "test_top5_error", len(results)) or blank,
        _mean(tested, "top5_error", len(results)) or blank,
    ]
    if test is None or train is None:
        return cells + [""] * (len(HEADER) - len(cells))
    return [
        *cells,
        str(test.count),
        f"{100 * train.mean:.2f}",
        f"last, step {results[0]['step']:,}",
        results[0]["data"],
        "; ".join(dict.fromkeys(_hardware(result) for result in results)),
        describe_seconds(statistics.fmean(result["seconds"] for result in results)),
    ]


def _mean(results: Sequence[dict[str, Any]], metric: str, count: int) -> str:
    """The mean of an error in percent, and of how many if not ``count``; or ""."""
    values = [result[metric] for result in results if metric in result]
    if not values:
        return ""
    note = "" if len(values) == count else f" (n = {len(values)})"
    return f"{100 * statistics.fmean(values):.2f}{note}"


def _hardware(result: dict[str, Any]) -> str:
    where = result["environment"]
    if where["devices"].endswith("cpu"):
        return f"{where['cpu_cores']} cores, {where['cpu']}"
    return where["devices"]


def _deepened(experiment: Experiment, section: Section) -> list[list[str]]:
    """A row for each net that was deepened."""
    rows = []
    for item in section.measured(experiment):
        for outcome in item.outcomes:
            found = section.analysis("deepened", item.entry.run, outcome.seed)
            if found is None:
                continue
            cells = [item.entry.label]
            for when in ("before", "after"):
                errors, count = found[f"errors_{when}"], found["count"]
                share = f"{100 * errors / count:.2f} ({errors} of {count})"
                cells += [str(found[f"blocks_{when}"]), share]
            rows.append([*cells, str(outcome.seed)])
    return rows


def _ensemble(experiment: Experiment, section: Section) -> list[list[str]]:
    """The row of the experiment's ensemble, once it was tested."""
    found = section.stored("ensemble", experiment.name)
    if found is None:
        return []
    errors = [_mean([found], name, 1) for name in ("error", "top5_error")]
    return [[f"{len(found['nets'])} nets", ", ".join(found["nets"]), *errors]]


def _layers(kind: str, section: Section, measured: Sequence[Measured]) -> Table:
    """The figure's layers in numbers: a row for each net that was analysed."""
    rows = []
    for item in measured:
        values = [value for _, value in section.layers(kind, item) or ()]
        if values:
            shown = (
                *(values[0], values[-1]),
                *(min(values), statistics.fmean(values), max(values)),
            )
            cells = [f"{value:.3g}" for value in shown]
            rows.append([item.entry.label, str(len(values)), *cells])
    return (_QUANTITIES[kind], *LAYERS_HEADER), rows


def _remarks(measured: Sequence[Measured]) -> list[str]:
    """Rows that were not measured, or not as published."""
    missing = [
        item.entry.label for item in measured if item.entry.run and not item.outcomes
    ]
    remarks = [f"not measured: {', '.join(missing)}"] if missing else []
    remarks += [sentence for item in measured for sentence in item.shortcomings]
    by_difference: dict[str, list[str]] = {}
    for item in measured:
        differences = ", ".join(_differences(item))
        if differences:
            by_difference.setdefault(differences, []).append(item.entry.label)
    return remarks + [
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
    experiment: Experiment, tables: list[Table], remarks: list[str], figure: Any | None
) -> list[str]:
    parts = [
        pages.heading(experiment.title, 3),
        pages.paragraph(f"{experiment.source}. {experiment.shows}"),
        pages.paragraph(experiment.protocol, "note"),
    ]
    if figure is not None:
        parts.append(pages.svg(figure))
    parts += [pages.grid(header, rows) for header, rows in tables]
    if remarks:
        parts.append(pages.heading(_REMARKS, 4))
        parts += [pages.paragraph(sentence, "note") for sentence in remarks]
    return parts


def _markdown(
    experiment: Experiment, tables: list[Table], remarks: list[str]
) -> list[str]:
    parts = [
        f"### {experiment.title}",
        f"{experiment.source}. {experiment.shows}",
        experiment.protocol,
    ]
    for header, rows in tables:
        lines = [header, ["---"] * len(header), *rows]
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
