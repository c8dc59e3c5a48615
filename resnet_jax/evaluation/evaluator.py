"""Evaluation that counts every example exactly once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from resnet_jax import distributed, parallel
from resnet_jax.config import Config
from resnet_jax.data.batch import Batch, Feed, gather
from resnet_jax.data.transforms import PixelStatistics, normalize, to_unit
from resnet_jax.evaluation.metrics import (
    TOP5_CLASSES,
    Sums,
    batch_sums,
    cross_entropy,
)


class Interrupted(Exception):  # noqa: N818 - not an error
    """The caller asked an evaluation to stop."""


def jit_over_batch(
    function: Callable[[Any, Any, jax.Array, jax.Array, Batch], Any], mesh: Mesh
) -> Callable[[Any, Any, Batch | None, Batch], Any]:
    """Jits a function of a sharded batch; the result is replicated.

    Args:
      function: takes (variables, other, images, labels, batch): variables whole on
        every device, any replicated input, uint8 images (n, h, w, c), labels (n,) and
        the batch itself, for its mask.
      mesh: the devices.

    Returns:
      A function of (variables, other, resident, batch), where ``resident`` is
      ``Feed.resident``. The variables may be cut over the devices.
    """

    def on_batch(variables, other, resident, batch):
        images, labels = gather(resident, batch)
        return function(
            parallel.gathered(variables, mesh), other, images, labels, batch
        )

    same, cut = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    return jax.jit(on_batch, in_shardings=(None, same, same, cut), out_shardings=same)


def evaluation_batch_size(config: Config, mesh: Mesh) -> int:
    """Examples per evaluation batch, rounded up to divide over the devices."""
    training = config.training
    size = (
        config.evaluation.batch_size
        or training.global_batch_size // training.micro_batches
    )
    return parallel.round_up(size, mesh)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates variables of one net on any split."""

    model: nn.Module
    mesh: Mesh

    @functools.cached_property
    def step(self) -> Callable[[Any, PixelStatistics, Batch | None, Batch], Sums]:
        """The jitted sums over one batch; see ``jit_over_batch``."""

        def sums_of(variables, statistics, images, labels, batch):
            images = normalize(to_unit(images), statistics)
            logits: Any = self.model.apply(variables, images, train=False)
            losses = cross_entropy(logits, labels)
            return batch_sums(logits, labels, losses, batch["mask"])

        return jit_over_batch(sums_of, self.mesh)

    def evaluate(
        self,
        variables: Any,
        statistics: PixelStatistics,
        feed: Feed,
        batch_size: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Loss and error over every example of a feed; see ``Sums.summary``.

        Args:
          variables: params and batch_stats.
          statistics: of the training pixels.
          feed: of the split.
          batch_size: need not divide the split.
          interrupted: called after each batch; True stops the evaluation. All
            processes must get the same answer.

        Raises:
          Interrupted: ``interrupted`` returned True.
          RuntimeError: an example was not counted exactly once, a bug here.
        """
        total, skipped_before = Sums.zeros(), len(feed.skipped)
        in_flight = parallel.InFlight()
        for batch in feed.evaluation_batches(batch_size):
            sums = self.step(variables, statistics, feed.resident, batch)
            total = total + parallel.settled(sums)
            in_flight.add(functools.partial(getattr, total, "count"))
            if interrupted():
                raise Interrupted
        summary = total.summary()
        skipped = distributed.sum_over_processes(len(feed.skipped) - skipped_before)
        expected = feed.num_examples - skipped
        if summary["count"] != expected:
            raise RuntimeError(
                f"evaluation counted {summary['count']} of {expected} examples"
            )
        if getattr(self.model, "num_classes", 0) < TOP5_CLASSES:
            del summary["top5_error"]
        return summary


def describe_error(name: str, errors: int, count: int) -> str:
    """An error in percent with its counts: ``test error 1.94 % (7 of 360)``."""
    return f"{name} error {100 * errors / count:.2f} % ({errors} of {count})"
