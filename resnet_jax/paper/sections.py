"""A folder of experiments: runs on one data set at one scale."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnet_jax import storage
from resnet_jax.config import fields
from resnet_jax.errors import UserError
from resnet_jax.paper.entries import Experiment, PaperRun, TableRow
from resnet_jax.paper.settings import SCALES, Setting
from resnet_jax.training.runs import Outcome, Spread
from resnet_jax.workdir import Workdir


class Section:
    """A folder of runs with the same setting, and which experiments were asked for."""

    def __init__(self, path: Path):
        """Names the folder; touches nothing."""
        self.path = path
        self._file = path / "setting.json"

    @property
    def exists(self) -> bool:
        """Whether experiments were begun here."""
        return self._read() is not None

    @property
    def setting(self) -> Setting:
        """The setting of all runs here."""
        content = self._read() or {}
        return Setting(content["dataset"], content["scale"], content["overrides"])

    @property
    def experiments(self) -> list[str]:
        """The names of the experiments that were asked for."""
        return (self._read() or {"experiments": []})["experiments"]

    def note(self, setting: Setting, experiment: str) -> None:
        """Records that an experiment runs here.

        Raises:
          UserError: the runs here are made with other overrides.
        """
        names, wanted = self.experiments, _lasting(setting)
        here = _lasting(self.setting) if names else wanted
        if here != wanted:
            differs = [
                f"{name} {_describe(getattr(here, name))} and not "
                f"{_describe(getattr(wanted, name))}"
                for name in ("dataset", "scale", "overrides")
                if getattr(here, name) != getattr(wanted, name)
            ]
            raise UserError(
                f"{self.path} holds runs with {', '.join(differs)}; give the same, or "
                "another --workdir"
            )
        content = dataclasses.asdict(
            dataclasses.replace(setting, overrides=dict(setting.overrides))
        )
        content["experiments"] = list(dict.fromkeys([*names, experiment]))
        Workdir(self.path).create()
        Workdir(self.path).write(self._file, json.dumps(content, indent=2) + "\n")

    def outcomes(self, run: PaperRun) -> list[Outcome]:
        """The outcome of each seed that was started."""
        folder = self.path / run.name
        if not folder.is_dir():
            return []
        seeds = sorted(
            int(path.name.removeprefix("seed-"))
            for path in folder.iterdir()
            if path.name.startswith("seed-")
        )
        found = []
        for seed in seeds:
            workdir = Workdir(folder / f"seed-{seed}")
            found.append(
                Outcome(workdir, seed, workdir.read_result(), workdir.read_failure())
            )
        return found

    def analysis(self, kind: str, run: PaperRun, seed: int) -> Any | None:
        """The result of an analysis, or None; see ``analyses``."""
        text = storage.read_text(analysis_file(self.path, kind, run.name, seed))
        return None if text is None else json.loads(text)

    def _read(self) -> Any | None:
        text = storage.read_text(self._file)
        return None if text is None else json.loads(text)


def _lasting(setting: Setting) -> Setting:
    """A setting without what may change from one start to the next."""
    known = fields()
    overrides = {
        name: value
        for name, value in setting.overrides.items()
        if name not in known or not known[name].operational
    }
    return dataclasses.replace(setting, overrides=overrides)


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"--config.{k}={v}" for k, v in value.items()) or "no override"
    return "of each recipe" if value is None else str(value)


def analysis_file(section: Path, kind: str, run: str, seed: int) -> Path:
    """Where an analysis of a run is kept."""
    return section / "analyses" / f"{kind}-{run}-{seed}.json"


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurements of a table row.

    Attributes:
      entry: of the experiment.
      outcomes: of the seeds that were begun.
    """

    entry: TableRow
    outcomes: list[Outcome]

    @property
    def results(self) -> list[dict[str, Any]]:
        """Of the finished seeds."""
        return [o.result for o in self.outcomes if o.result is not None]

    def spread(self, metric: str) -> Spread | None:
        """A metric over the finished seeds; None where there is none."""
        values = [result[metric] for result in self.results]
        return Spread.of(values) if values else None

    @property
    def is_missing(self) -> bool:
        """Whether its run was never begun."""
        return self.entry.run is not None and not self.outcomes

    @property
    def shortcomings(self) -> list[str]:
        """What has diverged, is not finished, or has fewer seeds than published."""
        run, label = self.entry.run, self.entry.label
        if run is None or not self.outcomes:
            return []
        said = []
        for outcome in self.outcomes:
            which = f"{label}, seed {outcome.seed}"
            if outcome.failure is not None:
                said.append(f"{which}: diverged: {outcome.failure}")
            elif outcome.is_open:
                rows = outcome.workdir.read_rows()
                at = f"at step {rows[-1]['step']:,}" if rows else "before its first row"
                said.append(f"{which}: not finished, {at}")
        if len(self.results) < run.seeds:
            said.append(f"{label}: n = {len(self.results)}; published: {run.seeds}")
        return said


def read_experiment(section: Section, experiment: Experiment) -> list[Measured]:
    """What a section has of an experiment, an item for each entry."""
    return [
        Measured(entry, [] if entry.run is None else section.outcomes(entry.run))
        for entry in experiment.entries
    ]


def describe_scale(setting: Setting) -> str:
    """The scale in words."""
    share = SCALES[setting.scale]
    if share == 1:
        return "full length"
    return f"{setting.scale} scale: 1/{round(1 / share)} of the full length"
