"""Quantities derived from a config and the size of its training set."""

import dataclasses
import math
from typing import Any

from resnet_jax.config.schema import MOST_STEPS
from resnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Derived:
    """The lengths of a run, in steps.

    Attributes:
      training_examples: without held-out examples.
      global_batch_size: examples per step.
      steps_per_epoch: a fraction if batches span epochs; whole with
        data.partial_batch=drop.
      steps, epochs: length of the run.
      boundaries: completed steps at which the learning rate falls.
      warmup_steps: length of the linear warm-up.
      log_every, evaluate_every, checkpoint_every: intervals in steps.
    """

    training_examples: int
    global_batch_size: int
    steps_per_epoch: float
    steps: int
    epochs: float
    boundaries: tuple[int, ...]
    warmup_steps: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int

    def notes(self) -> list[str]:
        """Notes on valid settings that may surprise."""
        notes = []
        if self.warmup_steps > self.steps:
            notes.append(
                f"note: the run ends at step {self.steps}, before the "
                f"warm-up of {self.warmup_steps} steps is over"
            )
        late = [step for step in self.boundaries if step >= self.steps]
        if late:
            notes.append(
                f"note: the run ends at step {self.steps}: the learning rate never "
                f"falls at {', '.join(map(str, late))}"
            )
        return notes


def derive(config: Any, training_examples: int) -> Derived:
    """Counts a run's steps; see ``Derived``.

    Raises:
      UserError: data.partial_batch=drop leaves no batch, or the run would be too long.
    """
    batch = config.training.global_batch_size
    per_epoch = training_examples / batch
    if config.data.partial_batch == "drop":
        per_epoch = float(training_examples // batch)
        if not per_epoch:
            raise UserError(
                f"data.partial_batch=drop leaves no batch of {batch} from "
                f"{training_examples} training examples: lower "
                "training.global_batch_size"
            )
    schedule = config.schedule

    def in_steps(epochs: float) -> int:
        steps = max(1, math.ceil(round(epochs * per_epoch, 6)))
        if steps > MOST_STEPS:
            raise UserError(
                f"{epochs:g} epochs of {training_examples:,} examples are {steps:,} "
                f"steps of {batch}, and a run has at most {MOST_STEPS:,}: lower "
                "training.epochs, or raise training.global_batch_size"
            )
        return steps

    steps = config.training.steps or in_steps(config.training.epochs or 0)
    if schedule.boundaries_epochs is not None:
        boundaries = tuple(in_steps(epoch) for epoch in schedule.boundaries_epochs)
    else:
        boundaries = schedule.boundaries_steps or ()
    warmup = schedule.warmup_steps or (
        in_steps(schedule.warmup_epochs) if schedule.warmup_epochs else 0
    )
    return Derived(
        training_examples=training_examples,
        global_batch_size=batch,
        steps_per_epoch=per_epoch,
        steps=steps,
        epochs=steps / per_epoch,
        boundaries=boundaries,
        warmup_steps=warmup,
        log_every=config.training.log_every_steps or min(100, math.ceil(steps / 20)),
        evaluate_every=config.evaluation.every_steps or in_steps(1),
        checkpoint_every=config.checkpoint.every_steps or in_steps(1),
    )
