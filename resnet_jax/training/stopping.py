"""Signals that ask a run to save and end: SIGTERM of a cluster, Ctrl-C, a hang-up.

The first one makes a run finish its step and save. A second ends the process at once.
"""

import collections
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
from resnet_jax.errors import Preempted
from resnet_jax.signals import STOP_SIGNALS, Listener, exit_now

_POLLS_IN_FLIGHT = 2
_SAME_SECONDS = 0.2
"""GNU timeout and some schedulers send SIGTERM to a process and again to its group."""


class StopSignal:
    """Whether a signal came; all processes agree. A context manager."""

    def __init__(self, say: Callable[[str], None]):
        """Reports signals with ``say``."""
        self._say = say
        self._listener = Listener(self._hear, STOP_SIGNALS)
        self._heard = threading.Event()
        self._number: int | None = None
        self._heard_at = 0.0
        self._nothing_to_save = True
        self._mesh: Mesh | None = None
        self._answers: collections.deque[jax.Array] = collections.deque()

    def __enter__(self) -> "StopSignal":
        self._listener.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self._listener.__exit__()

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

    def preempted(self, step: int) -> Preempted:
        """The error to raise after the run saved at ``step``."""
        number = self._number
        name = signal.Signals(number).name if number else "another process"
        status = 128 + signal.SIGINT if number == signal.SIGINT else 0
        return Preempted(
            f"stopped by {name} and saved at step {step}; the same command continues",
            status,
        )

    def _hear(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self._heard.is_set():
            if now - self._heard_at < _SAME_SECONDS:
                return
            exit_now(f"stopped at once by a second {name}", 128 + number)
        self._heard_at, self._number = now, number
        self._heard.set()
        # Among several processes, the others would wait for this one.
        if self._nothing_to_save and distributed.process_count() == 1:
            exit_now(
                f"stopped by {name} before its first step, with nothing new to save; "
                "the same command starts or resumes the run",
                128 + number if number == signal.SIGINT else 0,
            )
        self._say(f"{name}: the run finishes its step and saves; a second one ends it")
