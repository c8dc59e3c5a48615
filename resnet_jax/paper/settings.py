"""How experiments are run: data set, scale, overrides."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import resnet_jax
from resnet_jax.config import Config, flatten, load_config, parse
from resnet_jax.config.schema import ParallelConfig
from resnet_jax.errors import UserError, nearest
from resnet_jax.paper.entries import PaperRun
from resnet_jax.paper.experiments import find_experiment
from resnet_jax.storage import expand, is_remote, locate
from resnet_jax.training.runs import members_of

SCALES = {"paper": 1.0, "small": 1 / 100, "tiny": 1 / 1000}
"""Fraction of the published length of training."""

_NO_FLIP = {"augmentation.flip": "False"}
DATASETS: dict[str, dict[str, str]] = {
    "cifar10": {},
    "cifar100": {},
    "digits": {"augmentation.pad": "1", **_NO_FLIP},
    "mnist": {"augmentation.pad": "2", **_NO_FLIP},
    "fashion_mnist": {"augmentation.pad": "2"},
}
"""Known small data sets, and what each changes in a recipe for small images."""

_EVALUATIONS = 160  # about the paper's: once per epoch of CIFAR-10
_FEW_EVALUATIONS = 16
_LONG = 16_000


@dataclasses.dataclass(frozen=True)
class Setting:
    """How experiments are run.

    Attributes:
      dataset: a name of ``DATASETS`` or a folder; None for each recipe's own.
      scale: a name of ``SCALES``.
      overrides: config fields as text; they win over everything else.
    """

    dataset: str | None = None
    scale: str = "paper"
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def config(self, run: PaperRun) -> Config:
        """The config of a run.

        Raises:
          UserError: the data set or scale is unknown, or a field is wrong.
        """
        spec = str(config_folder() / run.config)
        chosen = {**run.overrides, **self._dataset_fields()}
        scaled = self._length_fields(load_config(spec, chosen))
        return load_config(spec, {**chosen, **scaled, **self.overrides})

    def members(self, run: PaperRun, seeds: int) -> dict[str, Config]:
        """The config of each seed's run, by its folder."""
        config = dataclasses.replace(self.config(run), seeds=seeds)
        return members_of(config, f"{self.section(config)}/{run.name}/")

    def section(self, config: Config) -> str:
        """The folder name of all runs on the same data at the same scale."""
        name = re.sub(r"[^A-Za-z0-9]+", "-", config.data.name).strip("-").lower()
        name = name or "data"
        return name if self.scale == "paper" else f"{name}-{self.scale}"

    def _dataset_fields(self) -> dict[str, str]:
        if self.dataset is None:
            return {}
        if self.dataset in DATASETS:
            return {"data.name": self.dataset, **DATASETS[self.dataset]}
        is_path = is_remote(self.dataset) or "/" in self.dataset
        if not is_path and not expand(self.dataset).exists():
            raise UserError(
                f"unknown data set {self.dataset!r}; give a folder, or one of "
                f"{', '.join(DATASETS)}"
            )
        return {"data.path": self.dataset, "data.name": locate(self.dataset).name}

    def _length_fields(self, config: Config) -> dict[str, str]:
        """Fields that scale the length of a run and set its intervals."""
        if self.scale not in SCALES:
            raise UserError(
                f"unknown scale {self.scale!r}; {nearest(self.scale, SCALES)}"
            )
        share, values = SCALES[self.scale], flatten(config)
        unit = "epochs" if config.training.steps is None else "steps"
        names = ("training.", "schedule.boundaries_", "schedule.warmup_")
        scaled = {
            f"{name}{unit}": _scale(values[f"{name}{unit}"], share, unit == "steps")
            for name in names
            if values[f"{name}{unit}"] is not None
        }
        if unit == "steps":
            steps = scaled["training.steps"]
            if "training.steps" in self.overrides:
                steps = parse("training.steps", self.overrides["training.steps"])
            if steps is not None:  # else the overrides count the run in epochs
                scaled |= _intervals(config, steps, share != 1.0)
        return {name: str(value) for name, value in scaled.items()}


def _scale(value: Any, share: float, whole: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(_scale(item, share, whole) for item in value)
    return max(1, math.ceil(value * share)) if whole else value * share


def _intervals(config: Config, steps: int, shortened: bool) -> dict[str, int]:
    """Steps between rows, evaluations and checkpoints, unless the recipe sets them.

    Epochs do not suit: one is 11 steps on the digits and 391 on CIFAR-10.
    """
    evaluations = _EVALUATIONS if steps >= _LONG else _FEW_EVALUATIONS
    rows = max(1, steps // (2 * evaluations))
    intervals = {"training.log_every_steps": min(config.training.log_every_steps, rows)}
    if shortened or config.evaluation.every_steps is None:
        intervals["evaluation.every_steps"] = max(1, steps // evaluations)
    if shortened or config.checkpoint.every_steps is None:
        intervals["checkpoint.every_steps"] = max(1, steps // (evaluations // 4))
    return intervals


def peer_timeout(experiment: str, setting: Setting) -> int:
    """Seconds that the processes of an experiment's runs wait for each other.

    Raises:
      UserError: the experiment is unknown, or a field is wrong.
    """
    for run in find_experiment(experiment).runs():
        return setting.config(run).parallel.peer_timeout_seconds
    return ParallelConfig().peer_timeout_seconds


def config_folder() -> Path:
    """The folder of config files: the checkout's, or that of the installed package."""
    package = Path(resnet_jax.__file__).parent
    is_checkout = (package.parent / "pyproject.toml").exists()
    return (package.parent if is_checkout else package) / "configs"
