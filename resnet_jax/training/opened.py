"""A run whose checkpoint is to be looked at: its net, variables and data."""

import dataclasses
import os

from resnet_jax.data.dataset import Split
from resnet_jax.errors import UserError
from resnet_jax.training.checkpoints import Checkpoints
from resnet_jax.training.setup import Setup, prepare
from resnet_jax.training.state import TrainState
from resnet_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class OpenedRun:
    """A checkpoint of a run and a split of its data.

    Attributes:
      setup: the parts of the run: net, data, devices.
      state: of the checkpoint, on the devices.
      step: of the checkpoint.
      split: the examples to look at.
    """

    setup: Setup
    state: TrainState
    step: int
    split: Split


def open_run(
    workdir: str | os.PathLike[str],
    *,
    split: str = "test",
    checkpoint: int | str = "last",
) -> OpenedRun:
    """Opens a checkpoint of a run and a split of its data.

    Args:
      workdir: of ``train``.
      split: "test", "holdout" or "train".
      checkpoint: "last", "best" (by the held-out error) or a step.

    Raises:
      UserError: there is no such run, checkpoint or split.
    """
    folder = Workdir(workdir)
    config = folder.read_config()
    if config is None:
        raise UserError(
            f"workdir {folder.path} holds no run (no config.json); train one with "
            "resnet-jax train"
        )
    if config.seeds > 1:
        raise UserError(
            f"workdir {folder.path} holds runs of {config.seeds} seeds; give that of "
            f"one: {folder.path / f'seed-{config.seed}'}"
        )
    setup = prepare(config)
    part = {
        "train": setup.dataset.train,
        "holdout": setup.dataset.holdout,
        "test": setup.dataset.test,
    }.get(split)
    if part is None:
        raise UserError(
            f"there is no split {split!r}; choose test or train, or holdout where "
            "data.holdout_examples or data.holdout_split is set"
        )
    state, step = _restore(setup, folder, checkpoint)
    return OpenedRun(setup, state, step, part)


def _restore(
    setup: Setup, folder: Workdir, checkpoint: int | str
) -> tuple[TrainState, int]:
    if not folder.checkpoints.is_dir():
        raise UserError(f"workdir {folder.path} holds no checkpoint yet")
    with Checkpoints(folder.checkpoints, setup.config.checkpoint) as checkpoints:
        step = _find_step(checkpoints, checkpoint, folder)
        try:
            state, _ = checkpoints.restore(step, setup.abstract_state())
        except UserError as error:
            others = [str(other) for other in checkpoints.steps() if other != step]
            raise UserError(
                f"{error}; other checkpoints: {', '.join(others) or 'none'}"
            ) from error
    return state, step


def _find_step(checkpoints: Checkpoints, wanted: int | str, folder: Workdir) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"workdir {folder.path} holds no checkpoint yet")
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
