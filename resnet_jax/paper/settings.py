"""How experiments are run: data set, scale, overrides."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from resnet_jax.config import Config, flatten, load_config, parse
from resnet_jax.config.files import config_folder
from resnet_jax.config.schema import ParallelConfig
from resnet_jax.errors import UserError, nearest
from resnet_jax.paper.entries import PaperRun
from resnet_jax.paper.experiments import find_experiment
from resnet_jax.storage import expand, is_remote, locate
from resnet_jax.training.runs import members_of

SCALES = {"paper": 1.0, "small": 1 / 100, "tiny": 1 / 1000}
"""Fraction of the published length of training."""


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A data set that stands in for a recipe's own.

    Attributes:
      fields: what it changes in a recipe, as text.
      folder: what ``data.path`` must hold, if tfds does not have it.
      for_imagenet: whether it suits ImageNet's recipes; otherwise those for small
        images.
    """

    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    folder: str | None = None
    for_imagenet: bool = False


_NO_FLIP = {"augmentation.flip": "False"}
DATASETS: dict[str, StandIn] = {
    "cifar10": StandIn(),
    "cifar100": StandIn(),
    "digits": StandIn({"augmentation.pad": "1", **_NO_FLIP}),
    "mnist": StandIn({"augmentation.pad": "2", **_NO_FLIP}),
    "fashion_mnist": StandIn({"augmentation.pad": "2"}),
    # Every size is a quarter of the recipe's, because the stored images have 64 pixels
    # where ImageNet's are resized to 256. So the centre crop is the recipe's share of
    # the image, without resizing. The share of held-out images is the recipe's too.
    "tiny-imagenet": StandIn(
        {
            "data.name": "Tiny ImageNet (64x64)",
            "data.test_split": "val",
            "data.holdout_examples": "2000",
            "data.image_size": "56",
            "data.eval_shorter_side": "64",
            "augmentation.shorter_side": "(64, 120)",
        },
        folder="Tiny-ImageNet-200 as distributed: train/WNID/images and val/images",
        for_imagenet=True,
    ),
}
"""Known data sets."""

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
        chosen = {**run.overrides, **self._dataset_fields(run)}
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

    def _dataset_fields(self, run: PaperRun) -> dict[str, str]:
        if self.dataset is None:
            return {}
        for_imagenet = run.config.startswith("imagenet")
        suitable = [
            name for name, x in DATASETS.items() if x.for_imagenet == for_imagenet
        ]
        if self.dataset in DATASETS:
            if self.dataset not in suitable:
                kind = "ImageNet" if for_imagenet else "small images"
                raise UserError(
                    f"data set {self.dataset!r} does not suit {run.name}, whose recipe "
                    f"is for {kind}; give a folder, or one of {', '.join(suitable)}"
                )
            stand_in = DATASETS[self.dataset]
            if stand_in.folder is not None and "data.path" not in self.overrides:
                raise UserError(
                    f"data set {self.dataset!r} needs --config.data.path=FOLDER with "
                    f"{stand_in.folder}"
                )
            return {"data.name": self.dataset, **stand_in.fields}
        is_path = is_remote(self.dataset) or "/" in self.dataset
        if not is_path and not expand(self.dataset).exists():
            raise UserError(
                f"unknown data set {self.dataset!r}; give a folder, or one of "
                f"{', '.join(suitable)}"
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
    intervals = {}
    if rows < (config.training.log_every_steps or 100):
        intervals["training.log_every_steps"] = rows
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
