"""Evaluation of a run's checkpoint."""

import os
from typing import Any

import rich.console

from resnet_jax import distributed
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluator import describe_error, evaluate_split
from resnet_jax.training.opened import open_run
from resnet_jax.training.precise_statistics import with_precise_statistics
from resnet_jax.training.progress import say
from resnet_jax.training.run import MANY_CLASSES


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
      precise_batches: recompute the batch statistics first, over the run's first so
        many batches, augmented as then; None: those of the checkpoint.
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
    run = open_run(workdir, split=split, checkpoint=checkpoint)
    setup, state = run.setup, run.state
    if precise_batches is not None:
        feed = setup.feed(setup.dataset.train)
        state = with_precise_statistics(setup, state, feed, precise_batches)
        say(console, f"batch statistics averaged over {precise_batches} batches")
    size = batch_size or setup.evaluation_batch_size
    size = -(-size // setup.mesh.size) * setup.mesh.size
    summary = evaluate_split(
        setup.eval_step(),
        state.evaluation_variables(),
        state.statistics,
        setup.feed(run.split),
        size,
    )
    say(console, f"checkpoint at step {run.step}, loss {summary['loss']:.4f}")
    if setup.dataset.num_classes >= MANY_CLASSES:
        say(console, f"{split} top-5 error {100 * summary['top5_error']:.2f} %")
    else:
        del summary["top5_error"]
    say(console, describe_error(split, summary["errors"], summary["count"]))
    return summary | {"step": run.step}
