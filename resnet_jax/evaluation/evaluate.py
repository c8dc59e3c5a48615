"""Evaluation of a run's checkpoint."""

import os
from collections.abc import Mapping
from typing import Any

import rich.console

from resnet_jax import parallel
from resnet_jax.console import make_console, say
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluator import (
    Evaluator,
    describe_error,
    evaluation_batch_size,
)
from resnet_jax.evaluation.precise_statistics import precise_variables
from resnet_jax.evaluation.saved_run import load_run


def evaluate(
    workdir: str | os.PathLike[str],
    *,
    split: str = "test",
    checkpoint: int | str = "last",
    batch_size: int | None = None,
    precise_batches: int | None = None,
    overrides: Mapping[str, str] | None = None,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run on a whole split, every example once.

    Args:
      workdir: of ``train``.
      split: "test", "holdout" or "train" (centre crops, running statistics).
      checkpoint: "last", "best" (lowest held-out error) or a step.
      batch_size: examples per batch, by default the config's; changes no result.
      precise_batches: first recompute the batch statistics over this many of the run's
        first batches; None keeps the checkpoint's.
      overrides: values as text for fields of ``saved_run.DATA_FIELDS``, such as
        ``{"data.path": "/data/moved"}``: where the data are now, or other data of the
        same classes. Labels are matched by class name.
      console: where to print; standard output by default.

    Returns:
      loss, error, errors, count (top5_error with 100 classes or more) and the step of
      the checkpoint.

    Raises:
      UserError: there is no such run, checkpoint or split, or the data are not the
        run's.
    """
    given = {"batch size": batch_size, "number of precise batches": precise_batches}
    for name, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"the {name} must be at least 1, not {value}")
    console = console or make_console()
    run = load_run(workdir, checkpoint, overrides)
    feed, variables = run.feed(run.split(split)), run.variables
    if precise_batches is not None:
        variables = precise_variables(
            run.model,
            run.config,
            run.mesh,
            variables,
            run.statistics,
            run.rng,
            run.feed(run.split("train")),
            precise_batches,
        )
        say(console, f"batch statistics averaged over {precise_batches} batches")
    size = evaluation_batch_size(run.config, run.mesh)
    if batch_size is not None:
        size = parallel.round_up(batch_size, run.mesh)
    evaluator = Evaluator(run.model, run.mesh)
    summary = evaluator.evaluate(variables, run.statistics, feed, size)
    say(console, f"checkpoint at step {run.step}, loss {summary['loss']:.4f}")
    if "top5_error" in summary:
        say(console, f"{split} top-5 error {100 * summary['top5_error']:.2f} %")
    say(console, describe_error(split, summary["errors"], summary["count"]))
    return summary | {"step": run.step}
