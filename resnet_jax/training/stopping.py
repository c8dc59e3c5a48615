"""SIGTERM, which a cluster sends before it takes a machine away.

The first SIGTERM makes a run finish its step and save; a second ends the process at
once. A thread receives them, because Python runs its own handlers in the main thread,
which may compile for minutes.
"""

import collections
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from resnet_jax import distributed, parallel

_AT_ONCE = 128 + signal.SIGTERM
_POLLS_IN_FLIGHT = 2
_SAME_SECONDS = 0.2
"""GNU timeout and some schedulers send SIGTERM to a process and again to its group."""


class StopSignal:
    """Whether SIGTERM came; all processes agree. A context manager.

    It handles SIGTERM only in the main thread, and only if the process has no handler
    yet: an application that embeds a run keeps its signals.
    """

    def __init__(self, say: Callable[[str], None]):
        """Reports signals with ``say``."""
        self._say = say
        self._heard = threading.Event()
        self._heard_at = 0.0
        self._nothing_to_save = True
        self._mesh: Mesh | None = None
        self._answers: collections.deque[jax.Array] = collections.deque()

    def __enter__(self) -> "StopSignal":
        self._installed = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        )
        if self._installed:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._previous_fd = signal.set_wakeup_fd(
                self._writer, warn_on_full_buffer=False
            )
            # Only signals with a Python handler are written to the pipe.
            signal.signal(signal.SIGTERM, lambda *_: None)
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._writer)

    def agree_over(self, mesh: Mesh) -> None:
        """Makes ``asked`` answer for all processes of these devices."""
        self._mesh = mesh
        self._any = jax.jit(jnp.max, out_shardings=parallel.replicated(mesh))

    def steps_were_made(self) -> None:
        """Records that there is something to save."""
        self._nothing_to_save = False

    def asked(self) -> bool:
        """Whether the run should stop here; the same on all processes.

        All processes must call it equally often. An all-reduce asks, and its answer is
        read a few calls later, so that no step waits for the one before.
        """
        if self._mesh is None or distributed.process_count() == 1:
            return self._heard.is_set()
        local = np.full(len(self._mesh.local_devices), self._heard.is_set(), np.int32)
        everywhere = parallel.place(local, parallel.batch_sharding(self._mesh))
        self._answers.append(self._any(everywhere))
        if len(self._answers) <= _POLLS_IN_FLIGHT:
            return False
        return bool(self._answers.popleft())

    def _listen(self) -> None:
        # On exit, the other end of the pipe is closed and the read returns nothing.
        while number := os.read(self._reader, 1):
            if number[0] == signal.SIGTERM:
                self._hear()
        os.close(self._reader)

    def _hear(self) -> None:
        now = time.monotonic()
        if self._heard.is_set():
            if now - self._heard_at < _SAME_SECONDS:
                return
            distributed.exit_now("stopped at once by a second SIGTERM", _AT_ONCE)
        self._heard_at = now
        self._heard.set()
        # Among several processes, the others would wait for this one.
        if self._nothing_to_save and distributed.process_count() == 1:
            distributed.exit_now(
                "stopped by SIGTERM before its first step, with nothing new to save; "
                "the same command starts or resumes the run",
                0,
            )
        self._say("SIGTERM: the run finishes its step and saves; a second one ends it")
