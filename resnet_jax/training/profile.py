"""A profile of some steps, for xprof."""

from pathlib import Path

import jax


class Profile:
    """Traces the steps of a range with jax's profiler, on every host."""

    def __init__(self, folder: Path, steps: range | None):
        """Traces ``steps`` into ``folder``; None: nothing."""
        self._folder, self._steps = folder, steps or range(0)
        self._tracing = False

    def before(self, step: int) -> None:
        """Begins where ``step`` is one to trace."""
        if step in self._steps and not self._tracing:
            options = jax.profiler.ProfileOptions()
            # One name for all hosts: xprof shows their traces together.
            options.session_id = f"steps_{self._steps.start}_{self._steps.stop}"
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._tracing = True

    def after(self, step: int, state: object) -> bool:
        """Ends behind the last step of the range; says whether it did."""
        if not self._tracing or step + 1 in self._steps:
            return False
        jax.block_until_ready(state)
        self.close()
        return True

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
