"""The parts of an experiment."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

FigureKind = Literal["train_and_test", "curves", "responses", "gradients", "depth"]
AnalysisKind = Literal[
    "responses", "gradients", "deepened", "ten_crop", "multi_scale", "ensemble"
]


@dataclasses.dataclass(frozen=True)
class PaperRun:
    """A net and how it is trained. Several experiments may share one.

    Attributes:
      name: name of its folder, which different runs do not share.
      config: a file of configs/ with its argument: ``cifar10.py:cifar_resnet20``.
      overrides: fields that differ from that config, as text.
      seeds: number of runs behind the published error, if known.
    """

    name: str
    config: str
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seeds: int = 1


@dataclasses.dataclass(frozen=True)
class Published:
    """Published errors of a net, in percent; top-1 unless they say top-5.

    Attributes:
      error: error of the best run, or of the only one.
      mean, deviation: over several runs, if published.
      note: what a reader must know about them.
      top5: top-5 error, if published.
    """

    error: float | None = None
    mean: float | None = None
    deviation: float | None = None
    note: str = ""
    top5: float | None = None

    def __str__(self) -> str:
        """The top-1 error, with mean, deviation and note."""
        parts = [] if self.error is None else [f"{self.error:.2f}"]
        if self.mean is not None:
            spread = "" if self.deviation is None else f" \u00b1 {self.deviation:.2f}"
            parts.append(f"({self.mean:.2f}{spread})")
        if self.note and not self._is_top5_alone:
            parts.append(f"({self.note})")
        return " ".join(parts)

    @property
    def top5_text(self) -> str:
        """The top-5 error, with the note if there is no top-1 error."""
        if self.top5 is None:
            return ""
        note = f" ({self.note})" if self.note and self._is_top5_alone else ""
        return f"{self.top5:.2f}{note}"

    @property
    def _is_top5_alone(self) -> bool:
        return self.error is None and self.top5 is not None


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A row of a table, or a line of a figure.

    Attributes:
      label: the publication's name of the net.
      run: the run that measures it here; None for a number that is only quoted.
      published: its published errors, if any.
    """

    label: str
    run: PaperRun | None = None
    published: Published | None = None


def row(
    label: str,
    run: PaperRun | None = None,
    error: float | None = None,
    mean: float | None = None,
    deviation: float | None = None,
    note: str = "",
    top5: float | None = None,
) -> TableRow:
    """A row and its published errors, if there are any; see ``Published``."""
    published = Published(error, mean, deviation, note, top5)
    return TableRow(label, run, None if published == Published() else published)


@dataclasses.dataclass(frozen=True)
class Panel:
    """A part of a figure, with the labels of the rows drawn in it."""

    title: str
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table or figure.

    Attributes:
      name: its name on the command line.
      title: one line for listings and reports.
      source: where it was published.
      shows: the finding, in a sentence or two.
      protocol: how errors were measured, in the publication and here.
      entries: its rows or lines.
      figure: kind of figure; None for a table alone.
      panels: parts of that figure.
      analysis: what is computed besides training, from the last checkpoints or, if
        ``trains`` is False, from fresh nets.
      trains: whether its runs are trained.
      seeds: seeds that it needs of a run, by the run's name; by default as published.
    """

    name: str
    title: str
    source: str
    shows: str
    protocol: str
    entries: tuple[TableRow, ...]
    figure: FigureKind | None = None
    panels: tuple[Panel, ...] = ()
    analysis: AnalysisKind | None = None
    trains: bool = True
    seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def seeds_of(self, run: PaperRun) -> int:
        """The number of seeds of one of its runs."""
        return self.seeds.get(run.name, run.seeds)

    def runs(self) -> list[PaperRun]:
        """Its runs, each once, in order."""
        found = {e.run.name: e.run for e in self.entries if e.run is not None}
        return list(found.values())


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
      header: a title for each column.
      rows: of cells.
      title: of the table; "" if the experiment's is enough.
      note: a sentence for the reader.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
