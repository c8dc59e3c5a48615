"""A section: the folder of all runs on one data set at one scale."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnet_jax import storage
from resnet_jax.config import fields
from resnet_jax.errors import UserError
from resnet_jax.evaluation.figures import Spread
from resnet_jax.paper.entries import Experiment, PaperRun, TableRow
from resnet_jax.paper.settings import SCALES, Setting
from resnet_jax.training.runs import Outcome
from resnet_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Measured:
    """The outcomes of a table row, one per seed that was started."""

    entry: TableRow
    outcomes: list[Outcome]

    @property
    def results(self) -> list[dict[str, Any]]:
        """The results of the finished seeds."""
        return [o.result for o in self.outcomes if o.result is not None]

    def spread(self, metric: str) -> Spread | None:
        """A metric over the finished seeds; None if none has it."""
        values = [result[metric] for result in self.results if metric in result]
        return Spread.of(values) if values else None

    @property
    def shortcomings(self) -> list[str]:
        """Seeds that diverged, are not finished, or are fewer than published."""
        run, label = self.entry.run, self.entry.label
        if run is None or not self.outcomes:
            return []
        sentences = []
        for outcome in self.outcomes:
            which = f"{label}, seed {outcome.seed}"
            if outcome.failure is not None:
                sentences.append(f"{which}: diverged: {outcome.failure}")
            elif outcome.is_open:
                rows = outcome.workdir.read_rows()
                at = f"at step {rows[-1]['step']:,}" if rows else "before its first row"
                sentences.append(f"{which}: not finished, {at}")
        if len(self.results) < run.seeds:
            sentences.append(
                f"{label}: n = {len(self.results)}; published: {run.seeds}"
            )
        return sentences


_SETTING = ("dataset", "scale", "overrides")
"""The fields of a ``Setting``, in order."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A folder of runs with one setting, and the experiments run there."""

    path: Path
    setting: Setting
    experiments: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "Section | None":
        """The section in a folder, or None."""
        text = storage.read_text(path / "setting.json")
        if text is None:
            return None
        try:
            content = json.loads(text)
            setting = Setting(*(content[name] for name in _SETTING))
            SCALES[setting.scale], dict(setting.overrides)
            return cls(path, setting, tuple(content["experiments"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path / 'setting.json'} is damaged; restore it, or run the same "
                "resnet-jax paper run command in another --workdir"
            ) from None

    @classmethod
    def note(cls, path: Path, setting: Setting, experiment: str) -> None:
        """Records that an experiment runs in a folder.

        Raises:
          UserError: the folder holds runs with another setting.
        """
        present = cls.read(path) or cls(path, setting, ())
        here, wanted = _lasting(present.setting), _lasting(setting)
        differs = [
            f"{name} {_describe(getattr(here, name))} and not "
            f"{_describe(getattr(wanted, name))}"
            for name in _SETTING
            if getattr(here, name) != getattr(wanted, name)
        ]
        if differs:
            raise UserError(
                f"{path} holds runs with {', '.join(differs)}; use the same setting "
                "or another --workdir"
            )
        content = {
            "dataset": setting.dataset,
            "scale": setting.scale,
            "overrides": dict(setting.overrides),
            "experiments": list(dict.fromkeys([*present.experiments, experiment])),
        }
        Workdir(path).create()
        Workdir(path).write_json("setting.json", content)

    def describe(self) -> str:
        """The scale in words."""
        share = SCALES[self.setting.scale]
        if share == 1:
            return "full length"
        return f"{self.setting.scale} scale: 1/{round(1 / share)} of the full length"

    def outcomes(self, run: PaperRun) -> list[Outcome]:
        """The outcome of each seed that was started."""
        folder = self.path / run.name
        outcomes = []
        names = [path.name.removeprefix("seed-") for path in folder.glob("seed-*")]
        for seed in sorted(int(name) for name in names if re.fullmatch("[0-9]+", name)):
            workdir = Workdir(folder / f"seed-{seed}")
            outcomes.append(Outcome.read(workdir, seed))
        return outcomes

    def measured(self, experiment: Experiment) -> list[Measured]:
        """The outcomes of an experiment, one item per row."""
        return [
            Measured(entry, [] if entry.run is None else self.outcomes(entry.run))
            for entry in experiment.entries
        ]

    def analysis(self, kind: str, run: PaperRun | None, seed: int) -> Any | None:
        """The result of an analysis, or None; see ``analyses``."""
        if run is None:
            return None
        return self.stored(kind, f"{run.name}-{seed}")

    def stored(self, kind: str, name: str) -> Any | None:
        """The result of an analysis by the name of its file, or None."""
        text = storage.read_text(analysis_file(self.path, kind, name))
        return None if text is None else json.loads(text)

    def layers(self, kind: str, measured: Measured) -> list[tuple[str, float]] | None:
        """Name and value of each layer, of the first seed that was analysed, or None.

        Args:
          kind: "responses" or "gradients".
          measured: the outcomes of a row.
        """
        # The gradients are of fresh nets, which leave no outcome.
        seeds = [outcome.seed for outcome in measured.outcomes] or [0]
        found = (self.analysis(kind, measured.entry.run, seed) for seed in seeds)
        return next(filter(None, found), None)


def analysis_file(section: Path, kind: str, name: str) -> Path:
    """The file of an analysis of a run, named RUN-SEED, or of an experiment."""
    return section / "analyses" / f"{kind}-{name}.json"


def _lasting(setting: Setting) -> Setting:
    """A setting without the overrides that may change from one start to the next."""
    known = fields()
    overrides = {
        name: value
        for name, value in setting.overrides.items()
        if name not in known or not known[name].operational
    }
    return dataclasses.replace(setting, overrides=overrides)


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"--config.{k}={v}" for k, v in value.items()) or "none"
    return "of each recipe" if value is None else str(value)
