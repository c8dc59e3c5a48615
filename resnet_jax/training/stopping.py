"""SIGTERM: what a cluster sends before it takes a machine away.

The first one asks a run to finish its step and save; a second ends the process at
once. A thread hears them, since Python's own handlers wait for the main thread, which
may compile for minutes.
"""

import collections
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from resnet_jax import distributed, parallel

_AT_ONCE = 128 + signal.SIGTERM
_POLLS_IN_FLIGHT = 2
_SAME_SECONDS = 0.2
"""GNU timeout and some schedulers send one SIGTERM to a process and to its group."""


class StopSignal:
    """SIGTERM heard, and agreed on by all processes; a context manager.

    Only where the process has no handler of its own, and in the main thread: an
    application that embeds a run keeps its signals.
    """

    def __init__(self, say: Callable[[str], None]):
        """Prints what it hears with ``say``."""
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
            # A handler of Python's makes the signal arrive at the pipe.
            signal.signal(signal.SIGTERM, lambda *_: None)
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._writer)

    def agree_over(self, mesh: Mesh) -> None:
        """Lets ``asked`` speak for all processes of these devices."""
        self._mesh = mesh
        self._any = jax.jit(jnp.max, out_shardings=parallel.replicated(mesh))

    def steps_were_made(self) -> None:
        """From now on there is something to save."""
        self._nothing_to_save = False

    def asked(self) -> bool:
        """Whether the run shall stop here; the same on all processes.

        With several processes, each calls it as often as the others: an all-reduce
        carries the question, and is answered a few calls later, so that no step waits
        for the one before it.
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
        # The pipe's end is closed on leaving, and nothing more can be read.
        while number := os.read(self._reader, 1):
            if number[0] == signal.SIGTERM:
                self._hear()
        os.close(self._reader)

    def _hear(self) -> None:
        now = time.monotonic()
        if self._heard.is_set():
            if now - self._heard_at < _SAME_SECONDS:
                return
            _end("stopped at once by a second SIGTERM", _AT_ONCE)
        self._heard_at = now
        self._heard.set()
        # Other processes would wait for one that leaves before the first step.
        if self._nothing_to_save and distributed.process_count() == 1:
            _end(
                "stopped by SIGTERM before its first step, with nothing new to save; "
                "the same command starts or goes on",
                0,
            )
        self._say("SIGTERM: the run finishes its step and saves; a second one ends it")


def _end(sentence: str, status: int) -> NoReturn:
    sys.stdout.flush()
    print(f"resnet-jax: {sentence}", file=sys.stderr, flush=True)
    os._exit(status)
