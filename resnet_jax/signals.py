"""Signals, heard by a thread, and the end of a process.

Python runs a signal's handler in the main thread, between two bytecodes: not while XLA
compiles. If the handler raises an exception, the code that it interrupts may swallow
it. So a thread listens, and it can end the process whatever the main thread does.

This module imports nothing slow: a command listens from its first moment.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from resnet_jax.errors import printable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a run to save and end."""

temporary_files: set[Path] = set()
"""``exit_now`` deletes them."""

_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


def _wake(*_: Any) -> None:
    """The handler of a signal that a Listener takes: only such signals wake it."""


class Listener:
    """Calls a function in a thread for each signal; a context manager.

    It takes signals only in the main thread, and only those that nothing else handles:
    an application that embeds a run keeps its signals.
    """

    def __init__(self, hear: Callable[[int], None], numbers: Sequence[int]):
        """``hear`` is called with the number of each signal in ``numbers``."""
        self._hear, self._numbers = hear, numbers
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Listener":
        if threading.current_thread() is not threading.main_thread():
            return self
        free = (signal.SIG_DFL, signal.default_int_handler, _wake)
        handlers = {number: signal.getsignal(number) for number in self._numbers}
        self._previous = {n: h for n, h in handlers.items() if h in free}
        if self._previous:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._previous_fd = signal.set_wakeup_fd(
                self._writer, warn_on_full_buffer=False
            )
            for number in self._previous:
                signal.signal(number, _wake)
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._writer)

    def _listen(self) -> None:
        # On exit, the other end of the pipe is closed and the read returns nothing.
        while number := os.read(self._reader, 1):
            if number[0] in self._previous:
                self._hear(number[0])
        os.close(self._reader)


def exit_now(sentence: str, status: int) -> NoReturn:
    """Ends the process from any thread, even if the main one waits in a collective."""
    with contextlib.suppress(Exception):
        sys.stdout.write(_SHOW_CURSOR if sys.stdout.isatty() else "")
        sys.stdout.flush()
        print(f"resnet-jax: {printable(sentence)}", file=sys.stderr, flush=True)
    for file in list(temporary_files):
        with contextlib.suppress(OSError):
            file.unlink()
    os._exit(status)
