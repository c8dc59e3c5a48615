"""What an experiment is made of."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

FigureKind = Literal["train_and_test", "curves", "responses", "gradients", "depth"]
AnalysisKind = Literal["responses", "gradients", "deepened"]


@dataclasses.dataclass(frozen=True)
class PaperRun:
    """A net and how it is trained; several experiments may share one.

    Attributes:
      name: of its folder; no two different runs have the same.
      config: a file of configs/, with its argument: ``cifar10.py:cifar_resnet20``.
      overrides: fields that differ from that config, with their values as text.
      seeds: how many the publication ran, as far as it says.
    """

    name: str
    config: str
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seeds: int = 1


@dataclasses.dataclass(frozen=True)
class Published:
    """An error as published, in percent.

    Attributes:
      error: of the best run, or of the only one.
      mean, deviation: over several runs, where they are given.
      note: what a reader has to know about it.
    """

    error: float | None = None
    mean: float | None = None
    deviation: float | None = None
    note: str = ""

    def __str__(self) -> str:
        parts = [] if self.error is None else [f"{self.error:.2f}"]
        if self.mean is not None:
            spread = "" if self.deviation is None else f" \u00b1 {self.deviation:.2f}"
            mean = f"{self.mean:.2f}{spread}"
            parts.append(f"({mean})" if parts else mean)
        return " ".join(parts)


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A row of a table, or a line of a figure.

    Attributes:
      label: as the publication calls the net.
      run: what is run here; None for a figure that is only quoted.
      published: its error; None where only a curve, or nothing, is.
    """

    label: str
    run: PaperRun | None = None
    published: Published | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """A part of a figure: the labels of the entries that are drawn in it."""

    title: str
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table or figure, of the paper or beside it.

    Attributes:
      name: as one types it.
      title: what it is.
      source: where it was published.
      shows: what it is to show, in a sentence.
      protocol: how the published errors were taken, and how ours are where that
        differs.
      entries: its rows or lines.
      figure: how it is drawn; None: as a table alone.
      panels: of that figure.
      analysis: what is computed beside the training: from the last checkpoints, or
        with ``trains`` False from the nets' first state.
      trains: whether its runs are trained.
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

    def runs(self) -> list[PaperRun]:
        """Its runs, each once, in order."""
        found = {e.run.name: e.run for e in self.entries if e.run is not None}
        return list(found.values())
