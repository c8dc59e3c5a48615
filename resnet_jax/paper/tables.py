"""Tables of an experiment: published errors beside measured ones, and analyses.

Published errors stand beside measured ones of the same data and length of training
alone. Runs on other data or of another length have a table of their own.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from resnet_jax.config import Config
from resnet_jax.console import describe_seconds
from resnet_jax.paper.entries import Experiment, Published, Table
from resnet_jax.paper.sections import Measured, Section
from resnet_jax.paper.settings import Setting

VIEWS = {"ten_crop": "10-crop", "multi_scale": "several scales"}
"""Analyses that test a net with several views per image."""


def tables(
    experiment: Experiment, section: Section, measured: Sequence[Measured]
) -> list[Table]:
    """The experiment's tables: errors, and what its analysis found."""
    found = _errors(experiment, section, measured) if experiment.trains else []
    if experiment.analysis == "deepened":
        found.append(_deepened(section, measured))
    if experiment.analysis == "ensemble":
        found.append(_ensemble(experiment, section))
    if experiment.analysis in _QUANTITIES:
        found.append(_layers(experiment.analysis, section, measured))
    return [table for table in found if table.rows]


# Errors


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Under which errors can be compared.

    Attributes:
      data: name of the data set.
      length: of the training, in steps or epochs.
    """

    data: str
    length: str

    @classmethod
    def of(cls, config: Config) -> "Conditions":
        """The conditions of a config's run."""
        steps, epochs = config.training.steps, config.training.epochs
        length = f"{epochs:g} epochs" if steps is None else f"{steps:,} steps"
        return cls(config.data.name, length)

    def __str__(self) -> str:
        return f"{self.data}, {self.length}"


@dataclasses.dataclass(frozen=True)
class _Line:
    """A row before it is text; ``tested`` are its results with several views."""

    measured: Measured
    tested: Sequence[dict[str, Any]]

    @property
    def published(self) -> Published:
        return self.measured.entry.published or Published()

    @property
    def results(self) -> list[dict[str, Any]]:
        return self.measured.results

    def mean(self, metric: str) -> str:
        """The mean over the seeds, in percent."""
        return _mean(self.results, metric, len(self.results))

    def mean_of_views(self, metric: str) -> str:
        """The same of the test with several views."""
        return _mean(self.tested, metric, len(self.results))

    def deviation(self) -> str:
        """The sample standard deviation of the test error; "" for one seed."""
        spread = self.measured.spread("test_error")
        if spread is None or spread.deviation is None:
            return ""
        return f"{100 * spread.deviation:.2f}"

    def each(self, describe: Callable[[dict[str, Any]], str]) -> str:
        """A description of every run; equal ones once."""
        return "; ".join(dict.fromkeys(map(describe, self.results)))

    def seconds(self) -> str:
        """The mean time of a run."""
        seconds = [result["seconds"] for result in self.results]
        return describe_seconds(statistics.fmean(seconds)) if seconds else ""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table of errors.

    Attributes:
      title: "{views}" stands for how several views are chosen.
      cell: the text of a line.
      is_published: whether it quotes the publication.
    """

    title: str
    cell: Callable[[_Line], str]
    is_published: bool = False


COLUMNS = (
    Column("", lambda line: line.measured.entry.label),
    Column("published (%)", lambda line: str(line.published), is_published=True),
    Column("measured (%)", lambda line: line.mean("test_error")),
    Column("deviation", _Line.deviation),
    Column("measured, {views} (%)", lambda line: line.mean_of_views("error")),
    Column(
        "published top-5 (%)", lambda line: line.published.top5_text, is_published=True
    ),
    Column("measured top-5 (%)", lambda line: line.mean("test_top5_error")),
    Column(
        "measured top-5, {views} (%)", lambda line: line.mean_of_views("top5_error")
    ),
    Column("n", lambda line: str(len(line.results) or "")),
    Column("training error (%)", lambda line: line.mean("train_error")),
    Column("checkpoint", lambda line: line.each(lambda r: f"last, step {r['step']:,}")),
    Column("data", lambda line: line.each(lambda result: result["data"])),
    Column("hardware", lambda line: line.each(_hardware)),
    Column("time per run", _Line.seconds),
)
"""Errors are test errors unless they say training; measured is the mean over n seeds,
and deviation the sample standard deviation. Columns without any value are left out."""


def _errors(
    experiment: Experiment, section: Section, measured: Sequence[Measured]
) -> list[Table]:
    """A table for each of the conditions under which nets were measured.

    The one with the published conditions also quotes the published errors. Nets without
    a finished run have no row.
    """
    by_conditions: dict[Conditions | None, list[_Line]] = {None: []}
    for item in measured:
        if item.results:
            by_conditions.setdefault(_conditions(item), []).append(
                _Line(item, _tested(experiment, section, item))
            )
    views = VIEWS.get(str(experiment.analysis), "")
    found = []
    if by_conditions[None]:
        lines = {id(line.measured): line for line in by_conditions[None]}
        # In the publication's order, with what it quotes from others.
        ordered = [
            lines.get(id(item)) or _Line(item, ())
            for item in measured
            if id(item) in lines or item.entry.run is None
        ]
        found.append(_table(ordered, COLUMNS, views))
    own = [column for column in COLUMNS if not column.is_published]
    for conditions, lines_of in by_conditions.items():
        if conditions is not None:
            title = f"Measured on {conditions}"
            note = _left_out(experiment, lines_of)
            found.append(_table(lines_of, own, views, title, note))
    return found


def _conditions(item: Measured) -> Conditions | None:
    """The conditions of finished runs; None if they are as published."""
    assert item.entry.run is not None
    configs = (o.workdir.read_config() for o in item.outcomes if o.result is not None)
    found = [Conditions.of(config) for config in configs if config is not None]
    published = Conditions.of(Setting().config(item.entry.run))
    return None if set(found) <= {published} else found[0]


def _left_out(experiment: Experiment, lines: Sequence[_Line]) -> str:
    """Says why published errors are not in a table; "" if there are none."""
    if not any(entry.published for entry in experiment.entries):
        return ""
    runs = [line.measured.entry.run for line in lines]
    published = (str(Conditions.of(Setting().config(run))) for run in runs if run)
    return (
        "Published errors are left out: they are for "
        f"{'; '.join(dict.fromkeys(published))}, and cannot be compared."
    )


def _tested(
    experiment: Experiment, section: Section, item: Measured
) -> list[dict[str, Any]]:
    """The results of the test with several views, for each seed that has one."""
    kind = str(experiment.analysis)
    if kind not in VIEWS:
        return []
    found = (section.analysis(kind, item.entry.run, o.seed) for o in item.outcomes)
    return [each for each in found if each]


def _table(
    lines: Sequence[_Line],
    columns: Sequence[Column],
    views: str,
    title: str = "",
    note: str = "",
) -> Table:
    """The table of lines, without the columns in which no line has a value."""
    cells = [[column.cell(line) for line in lines] for column in columns]
    kept = [i for i, column in enumerate(cells) if any(column)]
    return Table(
        header=[columns[i].title.format(views=views) for i in kept],
        rows=[[cells[i][row] for i in kept] for row in range(len(lines))],
        title=title,
        note=note,
    )


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


# Analyses

DEEPENED_HEADER = (
    "",
    "blocks",
    "test error (%)",
    "blocks with identities",
    "test error (%)",
    "seed",
)
"""Columns for trained nets deepened by identity layers."""

ENSEMBLE_HEADER = ("ensemble", "nets", "test error (%)", "test top-5 error (%)")
"""Columns for nets that answer together."""

LAYERS_HEADER = ("layers", "first", "last", "smallest", "mean", "largest")
"""Columns for the values of a net's layers; the first column names what they are."""

_QUANTITIES = {
    "responses": "standard deviation of responses",
    "gradients": "gradient norm",
}


def _deepened(section: Section, measured: Sequence[Measured]) -> Table:
    """A row for each net that was deepened."""
    rows = []
    for item in measured:
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
    return Table(DEEPENED_HEADER, rows)


def _ensemble(experiment: Experiment, section: Section) -> Table:
    """The row of the experiment's ensemble, once it was tested."""
    found = section.stored("ensemble", experiment.name)
    if found is None:
        return Table(ENSEMBLE_HEADER, [])
    errors = [_mean([found], name, 1) for name in ("error", "top5_error")]
    nets = ", ".join(found["nets"])
    return Table(ENSEMBLE_HEADER, [[f"{len(found['nets'])} nets", nets, *errors]])


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
    return Table((_QUANTITIES[kind], *LAYERS_HEADER), rows)
