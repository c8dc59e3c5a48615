"""Evaluation of a run's checkpoint."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import jax
import rich.console

from resnet_jax import distributed
from resnet_jax.data.batch import gather
from resnet_jax.data.transforms import PixelStatistics, augment_and_mix
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluator import describe_error, evaluate_split
from resnet_jax.models.statistics import precise_batch_stats
from resnet_jax.training.checkpoints import Checkpoints
from resnet_jax.training.progress import say
from resnet_jax.training.run import MANY_CLASSES
from resnet_jax.training.setup import Setup, prepare
from resnet_jax.workdir import Workdir


def evaluate(
    workdir: str | os.PathLike[str],
    *,
    split: str = "test",
    checkpoint: int | str = "last",
    batch_size: int | None = None,
    precise_batches: int | None = None,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run on a whole split, every example once.

    Args:
      workdir: of ``train``.
      split: "test", "holdout" or "train" (centre crops, running statistics).
      checkpoint: "last", "best" (by the held-out error) or a step.
      batch_size: examples a batch, the config's by default; changes no result.
      precise_batches: recompute the batch statistics first, as a plain average over so
        many batches of the training set, augmented and of the size as in training;
        None: the running ones.
      console: where to print; standard output by default.

    Returns:
      loss, error, errors and count, with the step of the checkpoint.

    Raises:
      UserError: there is no such run, checkpoint or split.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"the batch size must be at least 1, not {batch_size}")
    if precise_batches is not None and precise_batches < 1:
        raise UserError(
            f"the precise batches must be at least 1, not {precise_batches}"
        )
    console = console or rich.console.Console(quiet=not distributed.is_primary())
    folder = Workdir(workdir)
    config = folder.read_config()
    if config is None:
        raise UserError(
            f"workdir {folder.path} holds no run (no config.json); train one with "
            "resnet-jax train"
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
    if not folder.checkpoints.is_dir():
        raise UserError(f"workdir {folder.path} holds no checkpoint yet")
    with Checkpoints(folder.checkpoints, config.checkpoint) as checkpoints:
        step = _find_step(checkpoints, checkpoint, folder)
        try:
            state, _ = checkpoints.restore(step, setup.abstract_state())
        except UserError as error:
            others = [str(other) for other in checkpoints.steps() if other != step]
            raise UserError(
                f"{error}; other checkpoints: {', '.join(others) or 'none'}"
            ) from error
    variables = state.evaluation_variables()
    if precise_batches is not None:
        batches = _training_images(setup, state.statistics, precise_batches)
        stats = precise_batch_stats(setup.model, variables, batches)
        variables = variables | {"batch_stats": stats}
        say(console, f"batch statistics averaged over {precise_batches} batches")
    size = batch_size or setup.evaluation_batch_size
    size = -(-size // setup.mesh.size) * setup.mesh.size
    summary = evaluate_split(
        setup.eval_step(),
        variables,
        state.statistics,
        setup.feed(part),
        size,
    )
    say(console, f"checkpoint at step {step}, loss {summary['loss']:.4f}")
    if setup.dataset.num_classes >= MANY_CLASSES:
        say(console, f"{split} top-5 error {100 * summary['top5_error']:.2f} %")
    else:
        del summary["top5_error"]
    say(console, describe_error(split, summary["errors"], summary["count"]))
    return summary | {"step": step}


def _training_images(
    setup: Setup, pixels: PixelStatistics, count: int
) -> Iterator[jax.Array]:
    """The images of the run's first ``count`` batches, augmented as for training."""
    config = setup.config
    feed = setup.feed(setup.dataset.train)

    @jax.jit
    def prepare_images(key, resident, batch):
        images, _ = gather(resident, batch)
        return augment_and_mix(key, images, pixels, config.augmentation)[0]

    batches = feed.training_batches(0, config.training.global_batch_size, config.seed)
    with contextlib.closing(batches):
        for index, batch in enumerate(itertools.islice(batches, count)):
            key = jax.random.fold_in(jax.random.key(config.seed), index)
            yield prepare_images(key, feed.resident, batch)


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
