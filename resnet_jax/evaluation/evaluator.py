"""Evaluation that counts every example exactly once."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from resnet_jax import distributed, parallel
from resnet_jax.data.batch import Batch, Feed, gather
from resnet_jax.data.transforms import PixelStatistics, normalize, to_unit
from resnet_jax.evaluation.metrics import Sums, batch_sums, cross_entropy


class Interrupted(Exception):  # noqa: N818 - it is no error
    """An evaluation was asked to stop."""


EvalStep = Callable[[Any, PixelStatistics, Batch | None, Batch], Sums]


def make_eval_step(model: nn.Module, mesh: Mesh) -> EvalStep:
    """A jitted function of (variables, statistics, resident, batch) to ``Sums``.

    The variables may be replicated or cut over the devices.
    """

    def eval_step(variables, statistics, resident, batch):
        variables = parallel.gathered(variables, mesh)
        images, labels = gather(resident, batch)
        images = normalize(to_unit(images), statistics)
        logits: Any = model.apply(variables, images, train=False)
        losses = cross_entropy(logits, labels)
        return batch_sums(logits, labels, losses, batch["mask"])

    same, cut = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    return jax.jit(eval_step, in_shardings=(None, same, same, cut), out_shardings=same)


def evaluate_split(
    eval_step: EvalStep,
    variables: Any,
    statistics: PixelStatistics,
    feed: Feed,
    batch_size: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Loss and error over every example of a feed; see ``Sums.summary``.

    Args:
      eval_step: made by ``make_eval_step``.
      variables: params and batch_stats.
      statistics: of the training pixels.
      feed: the split.
      batch_size: examples a batch; need not divide the split.
      interrupted: asked after each batch whether to stop; the same on all processes.

    Raises:
      Interrupted: it was asked to stop.
      RuntimeError: not every example was counted once, a fault of this library.
    """
    total = Sums.zeros()
    skipped_before = len(feed.skipped)
    for batch in feed.evaluation_batches(batch_size):
        sums = eval_step(variables, statistics, feed.resident, batch)
        total = total + parallel.settled(sums)
        if interrupted():
            raise Interrupted
    summary = total.summary()
    skipped = distributed.sum_over_processes(len(feed.skipped) - skipped_before)
    expected = feed.num_examples - skipped
    if summary["count"] != expected:
        raise RuntimeError(
            f"evaluation counted {summary['count']} of {expected} examples"
        )
    return summary


def describe_error(name: str, errors: int, count: int) -> str:
    """An error in percent with its counts: ``test error 1.94 % (7 of 360)``."""
    return f"{name} error {100 * errors / count:.2f} % ({errors} of {count})"
