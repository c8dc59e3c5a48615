"""Calls of the compiled step: one batch at a time, or many steps on resident data."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from resnet_jax import parallel
from resnet_jax.data.batch import Feed
from resnet_jax.data.device_order import Place
from resnet_jax.training.setup import Setup
from resnet_jax.training.state import TrainState


class Call(NamedTuple):
    """What a call did.

    Attributes:
      state: after its last step, which need not have run yet.
      steps: how many it gave to the devices.
      compiled: whether it was its program's first, which includes the compiling.
    """

    state: TrainState
    steps: int
    compiled: bool


def call_length(steps_left: int, most: int) -> int:
    """The largest power of two that is neither above ``steps_left`` nor ``most``.

    Cut so, one call after the other, a stretch of steps needs few programs. What is
    left of it behind any call is cut as it would be alone: a run that was stopped there
    goes on with the same programs.
    """
    return 1 << (min(steps_left, most).bit_length() - 1)


class Stepper:
    """Advances the state of a run by calls of its compiled programs.

    Where ``Setup.steps_per_call`` is 1 a call takes one batch of the feed. Elsewhere it
    takes the place in the order, from which the program computes its batches.
    """

    def __init__(
        self,
        setup: Setup,
        feed: Feed,
        position: int,
        waiting: Callable[[], contextlib.AbstractContextManager[None]],
    ):
        """Begins at a global example index.

        Args:
          setup: of the run.
          feed: of its training set.
          position: the global example index.
          waiting: a context in which the next batch is waited for.
        """
        self._setup, self._feed, self._position = setup, feed, position
        self._waiting = waiting
        self._most = setup.steps_per_call
        self._batch_size = setup.config.training.global_batch_size
        self._batches = feed.training_batches(
            position, self._batch_size, setup.config.seed
        )
        self._order = setup.order()
        self._programs: dict[int, jax.stages.Wrapped] = {}

    def advance(self, state: TrainState, at_most: int) -> Call:
        """Makes one call of up to ``at_most`` steps; the old state is donated."""
        length = call_length(at_most, self._most)
        compiled = length not in self._programs
        if compiled:
            self._programs[length] = self._program(length)
        with self._waiting():
            argument = self._argument()
        first = self._position // self._batch_size + 1
        with jax.profiler.StepTraceAnnotation("train", step_num=first):
            state = self._programs[length](state, self._feed.resident, argument)
            parallel.settled(state)
        self._position += length * self._batch_size
        return Call(state, length, compiled)

    def close(self) -> None:
        """Ends the feed's threads and processes."""
        self._batches.close()

    def _program(self, length: int) -> jax.stages.Wrapped:
        if self._most == 1:
            return self._setup.train_step()
        return self._setup.train_steps(length)

    def _argument(self) -> Any:
        """The next batch, or the place of the next batches."""
        if self._most == 1:
            return next(self._batches)
        epoch, offset = self._order.place(self._position)
        seed = np.uint32(self._order.seed)
        return Place(seed, np.int32(epoch), np.int32(offset))
