"""A profile of some steps, for xprof."""

import contextlib
from collections.abc import Callable

import jax

from resnet_jax.storage import Mirror


class Profile:
    """Traces the steps of a range with jax's profiler, on every host."""

    def __init__(
        self,
        mirror: Callable[[], contextlib.AbstractContextManager[Mirror]],
        steps: range | None,
    ):
        """Traces ``steps`` into the folder that ``mirror`` opens; None traces nothing.

        The folder is on the disk: jax's profiler needs TensorFlow to write to a store.
        """
        self._mirror, self._steps = mirror, steps or range(0)
        self._open: contextlib.ExitStack | None = None
        self.ends = (self._steps[0] - 1, self._steps[-1]) if self._steps else ()
        """The steps after which it starts and ends: no call may run past them."""

    def before(self, step: int) -> None:
        """Starts the trace if ``step`` is in the range."""
        if step in self._steps and self._open is None:
            options = jax.profiler.ProfileOptions()
            # One name for all hosts: xprof shows their traces together.
            options.session_id = f"steps_{self._steps.start}_{self._steps.stop}"
            self._open = contextlib.ExitStack()
            folder = self._open.enter_context(self._mirror()).path
            jax.profiler.start_trace(folder, profiler_options=options)
            self._open.callback(jax.profiler.stop_trace)

    def after(self, step: int, state: object) -> bool:
        """Ends the trace after the last step of the range; returns whether it did."""
        if self._open is None or step + 1 in self._steps:
            return False
        jax.block_until_ready(state)
        self.close()
        return True

    def close(self) -> None:
        """Ends a trace that is running."""
        if self._open is not None:
            self._open.close()
            self._open = None
