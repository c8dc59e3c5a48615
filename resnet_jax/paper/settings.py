"""Where and how large experiments are run: the data set, the scale, the folders."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import resnet_jax
from resnet_jax.config import Config, load_config
from resnet_jax.config.schema import ParallelConfig
from resnet_jax.errors import UserError, nearest
from resnet_jax.paper.entries import PaperRun
from resnet_jax.paper.experiments import find_experiment
from resnet_jax.training.runs import Member, members_of

SCALES = {"paper": 1.0, "small": 1 / 100, "tiny": 1 / 1000}
"""Share of the published length of training."""

DATASETS: dict[str, dict[str, str]] = {
    "cifar10": {"data.name": "cifar10"},
    "cifar100": {"data.name": "cifar100"},
    "digits": {
        "data.name": "digits",
        "augmentation.pad": "1",
        "augmentation.flip": "False",
    },
    "mnist": {
        "data.name": "mnist",
        "augmentation.pad": "2",
        "augmentation.flip": "False",
    },
    "fashion_mnist": {"data.name": "fashion_mnist", "augmentation.pad": "2"},
}
"""What a data set changes in a recipe for small images; any folder may be named too."""

_EVALUATIONS = 160  # about the paper's: once an epoch of CIFAR-10
_FEW_EVALUATIONS = 16
_LONG = 16_000


@dataclasses.dataclass(frozen=True)
class Setting:
    """How experiments are run.

    Attributes:
      dataset: a name of ``DATASETS`` or a folder; None: each recipe's own.
      scale: a name of ``SCALES``.
      overrides: of config fields, as text; they have the last word.
    """

    dataset: str | None = None
    scale: str = "paper"
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def config(self, run: PaperRun) -> Config:
        """The config of a run.

        Raises:
          UserError: the data set is unknown, or a field is wrong.
        """
        spec = str(config_folder() / run.config)
        chosen = {**run.overrides, **self._of_dataset()}
        scaled = self._of_length(load_config(spec, chosen))
        return load_config(spec, {**chosen, **scaled, **self.overrides})

    def members(self, run: PaperRun, seeds: int) -> list[Member]:
        """A run for each seed, in its folder."""
        config = dataclasses.replace(self.config(run), seeds=seeds)
        return members_of(config, f"{self.section(config)}/{run.name}/")

    def section(self, config: Config) -> str:
        """The folder of all runs on the same data at the same scale."""
        name = re.sub(r"[^A-Za-z0-9]+", "-", config.data.name).strip("-").lower()
        return name if self.scale == "paper" else f"{name}-{self.scale}"

    def _of_dataset(self) -> dict[str, str]:
        if self.dataset is None:
            return {}
        if self.dataset in DATASETS:
            return DATASETS[self.dataset]
        if "/" not in self.dataset and not Path(self.dataset).exists():
            raise UserError(
                f"there is no data set {self.dataset!r}; give a folder, or one of "
                f"{', '.join(DATASETS)}"
            )
        return {"data.path": self.dataset, "data.name": Path(self.dataset).name}

    def _of_length(self, config: Config) -> dict[str, str]:
        """Fields that scale a run's length, and say how often it is looked at."""
        share = share_of(self.scale)
        unit = "epochs" if config.training.steps is None else "steps"
        lengths = {
            name: getattr(getattr(config, section), f"{name}_{unit}")
            for section, name in (("schedule", "boundaries"), ("schedule", "warmup"))
        }
        fields = {f"schedule.{name}_{unit}": value for name, value in lengths.items()}
        fields[f"training.{unit}"] = getattr(config.training, unit)
        scaled = {
            name: _times(value, share, whole=unit == "steps")
            for name, value in fields.items()
            if value is not None
        }
        if unit == "steps":
            wanted = self.overrides.get("training.steps", scaled["training.steps"])
            scaled |= _intervals(config, int(float(wanted)), share != 1.0)
        return {name: str(value) for name, value in scaled.items()}


def _times(value: Any, share: float, whole: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(_times(item, share, whole) for item in value)
    return max(1, math.ceil(value * share)) if whole else value * share


def _intervals(config: Config, steps: int, shortened: bool) -> dict[str, int]:
    """Steps between rows, evaluations and checkpoints, where the recipe leaves them.

    An epoch is no measure: it is eleven steps of the digits and 391 of CIFAR-10.
    """
    evaluations = _EVALUATIONS if steps >= _LONG else _FEW_EVALUATIONS
    intervals = {}
    if shortened or config.evaluation.every_steps is None:
        intervals["evaluation.every_steps"] = max(1, steps // evaluations)
    if shortened or config.checkpoint.every_steps is None:
        intervals["checkpoint.every_steps"] = max(1, steps // (evaluations // 4))
    rows = max(1, steps // (2 * evaluations))
    intervals["training.log_every_steps"] = min(config.training.log_every_steps, rows)
    return intervals


def share_of(scale: str) -> float:
    """The share of the published length.

    Raises:
      UserError: there is no such scale.
    """
    if scale not in SCALES:
        raise UserError(f"there is no scale {scale!r}; {nearest(scale, SCALES)}")
    return SCALES[scale]


def peer_timeout(experiment: str, setting: Setting) -> int:
    """How long the processes of an experiment's runs wait for each other, in seconds.

    Raises:
      UserError: there is no such experiment, or a field is wrong.
    """
    runs = find_experiment(experiment).runs()
    default = ParallelConfig().peer_timeout_seconds
    return setting.config(runs[0]).parallel.peer_timeout_seconds if runs else default


def config_folder() -> Path:
    """The folder of config files: the checkout's, or that of the installed package."""
    package = Path(resnet_jax.__file__).parent
    checkout = package.parent / "configs"
    is_checkout = (package.parent / "pyproject.toml").exists()
    return checkout if is_checkout else package / "configs"
