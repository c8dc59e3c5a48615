"""A trained net, loaded from the workdir of its run."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.checkpoints import Checkpoints, DamagedError
from resnet_jax.config import Config, override
from resnet_jax.config.build import build_model
from resnet_jax.data.dataset import Dataset, Split, open_dataset
from resnet_jax.data.feeds import Feed, make_feed
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.errors import UserError
from resnet_jax.identity import Identity
from resnet_jax.weights.shapes import classes
from resnet_jax.workdir import Workdir

_WHICH_DATA = (
    *("data.name", "data.path", "data.data_dir"),
    *("data.train_split", "data.test_split", "data.holdout_split"),
)
DATA_FIELDS = (
    *_WHICH_DATA,
    *("data.eval_image_size", "data.eval_shorter_side", "data.eval_interpolation"),
    *("data.resident", "data.num_threads", "data.num_processes", "data.on_error"),
)
"""The config fields that may differ from the run's when its net is evaluated."""


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A checkpoint of a run.

    Attributes:
      variables: params and batch_stats for evaluation, on the devices: the moving
        averages if the run keeps them.
      statistics: of the training pixels. The net expects
        ``normalize(to_unit(images), statistics)``.
      rng: the run's random key.
      step: of the checkpoint.
      trained_on: the run's data; None if the run is of an old version.
      other_data: whether the config names data other than the run's.
    """

    config: Config
    mesh: Mesh
    model: nn.Module
    variables: dict[str, Any]
    statistics: PixelStatistics
    rng: jax.Array
    step: int
    trained_on: Identity | None
    other_data: bool

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data, opened when first used, with the labels that the run had.

        Raises:
          UserError: they are not the run's data, or other data have other classes.
        """
        if self.trained_on is None:
            return open_dataset(self.config)
        opened = open_dataset(self.config, class_names=self.trained_on.class_names)
        if self.other_data:
            differs = self.trained_on.class_difference(opened.identity)
            advice = "give data of the run's classes"
        else:
            differs = self.trained_on.difference(opened.identity)
            advice = (
                "give the run's data, or other data of its classes with "
                "--config.data.path"
            )
        if differs is not None:
            raise UserError(f"the run was trained on other data: {differs}; {advice}")
        return opened

    def split(self, name: str) -> Split:
        """The split "test", "holdout" or "train"; UserError if the run lacks it."""
        known = name in ("train", "holdout", "test")
        found = getattr(self.dataset, name) if known else None
        if found is None:
            raise UserError(
                f"there is no split {name!r}; choose test or train, or holdout if "
                "data.holdout_examples or data.holdout_split is set"
            )
        return found

    def feed(self, split: Split) -> Feed:
        """Batches of a split, on the devices."""
        return make_feed(split, self.mesh, self.config.data, self.config.augmentation)


def load_run(
    workdir: str | os.PathLike[str],
    checkpoint: int | str = "last",
    overrides: Mapping[str, str] | None = None,
) -> SavedRun:
    """Loads the net of a run from a checkpoint. The data need not be there.

    Args:
      workdir: of ``train``.
      checkpoint: "last", "best" (lowest held-out error) or a step.
      overrides: values as text for config fields of ``DATA_FIELDS``.

    Raises:
      UserError: there is no such run or checkpoint, or it is damaged; or a field that
        is not in ``DATA_FIELDS``.
    """
    folder = Workdir(workdir)
    config = _config_of(folder, overrides or {})
    mesh = parallel.data_mesh()
    with Checkpoints(folder.checkpoints, config.checkpoint) as checkpoints:
        step, model, state, content = _restore(
            checkpoints, checkpoint, folder, config, mesh
        )
    variables = state.get("ema") or {
        name: state[name] for name in ("params", "batch_stats")
    }
    return SavedRun(
        config,
        mesh,
        model,
        variables,
        PixelStatistics(**state["statistics"]),
        state["rng"],
        step,
        trained_on=content.get("data") and Identity.from_json(content["data"]),
        other_data=any(name in _WHICH_DATA for name in overrides or ()),
    )


def _config_of(folder: Workdir, overrides: Mapping[str, str]) -> Config:
    """The config of a run that has checkpoints, with fields of the data replaced."""
    config = folder.read_config()
    if config is None:
        raise UserError(
            f"workdir {folder.path} holds no run (no config.json); train one with "
            "resnet-jax train"
        )
    for name in overrides:
        if name not in DATA_FIELDS:
            raise UserError(
                f"{name} cannot be changed for a trained net; only "
                f"{', '.join(DATA_FIELDS)} can"
            )
    if config.seeds > 1:
        raise UserError(
            f"workdir {folder.path} holds runs of {config.seeds} seeds; give one of "
            f"them, such as {folder.path / f'seed-{config.seed}'}"
        )
    if not folder.checkpoints.is_dir():
        raise UserError(f"workdir {folder.path} holds no checkpoint")
    return override(config, overrides)


def _restore(
    checkpoints: Checkpoints,
    which: int | str,
    folder: Workdir,
    config: Config,
    mesh: Mesh,
) -> tuple[int, nn.Module, Any, dict[str, Any]]:
    """The step of a checkpoint, its net, the state that evaluation needs, and content.

    A running training may replace a checkpoint while it is read; then the newer one is.
    """
    while True:
        step = find_step(checkpoints, which, folder)
        try:
            saved = checkpoints.shapes(step)
            model, wanted = _abstract_variables(config, saved, mesh)
            return step, model, *checkpoints.restore(step, wanted)
        except DamagedError as error:
            checkpoints.reload()
            steps = checkpoints.steps()
            if step in steps:
                others = ", ".join(str(other) for other in steps if other != step)
                raise UserError(
                    f"{error}; other checkpoints: {others or 'none'}"
                ) from error


def find_step(checkpoints: Checkpoints, wanted: int | str, folder: Workdir) -> int:
    """The step of the checkpoint "last", "best" or at a step.

    Raises:
      UserError: there is none.
    """
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"workdir {folder.path} holds no checkpoint")
    if wanted == "last":
        return steps[-1]
    if wanted == "best":
        best = checkpoints.best_step()
        if best is None:
            raise UserError(
                f"the run in {folder.path} has no best checkpoint: it needs "
                "data.holdout_examples or data.holdout_split, and checkpoint.best"
            )
        return best
    if wanted not in steps:
        raise UserError(
            f"there is no checkpoint at step {wanted}; there are "
            f"{', '.join(map(str, steps))}"
        )
    return int(wanted)


def _abstract_variables(
    config: Config, saved: Any, mesh: Mesh
) -> tuple[nn.Module, dict[str, Any]]:
    """The net of a checkpoint, and the fields of its state that evaluation needs.

    The number of classes and the shape of the images come from the saved arrays.
    """
    same = parallel.replicated(mesh)

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=same)

    variables = {"params": saved["params"], "batch_stats": saved["batch_stats"] or {}}
    fields = {"ema": saved["ema"]} if saved.get("ema") else variables
    key = jax.eval_shape(lambda: jax.random.key(0))
    wanted = jax.tree.map(abstract, {**fields, "statistics": saved["statistics"]})
    arrays = traverse_util.flatten_dict({"params": saved["params"]}, sep="/")
    model = build_model(config.model, classes(arrays))
    return model, {**wanted, "rng": abstract(key)}
