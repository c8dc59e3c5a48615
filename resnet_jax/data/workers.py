"""Work in threads, with a count of what is done."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import rich.console
import rich.progress

from resnet_jax.machine import usable_cores


class Stopped(Exception):  # noqa: N818 - no error: another thread met one
    """The work is to be left off."""


def in_threads(
    work: Callable[[Any, Callable[[], None]], None],
    items: Sequence[Any],
    threads: int | None,
    total: int,
    unit: str,
    console: rich.console.Console,
) -> None:
    """Calls ``work(item, tick)`` for all items and shows how far it is.

    Args:
      work: calls ``tick`` now and then, which raises Stopped once the work is over.
      items: what to call it with.
      threads: calls at once; None: one for each processor.
      total: how often ``tick`` will be called.
      unit: what is counted so.
      console: where it is shown.

    Raises:
      Exception: the first that ``work`` raises; it stops all.
    """
    stop = threading.Event()
    counter = _Counter(total, unit, console)

    def tick() -> None:
        if stop.is_set():
            raise Stopped
        counter.count()

    workers = threads or usable_cores()
    with counter, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, item, tick) for item in items]
        try:
            _wait(futures, counter)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _wait(futures: Sequence[Future[None]], counter: "_Counter") -> None:
    waiting = set(futures)
    while waiting:
        finished, waiting = wait(waiting, 0.2, FIRST_EXCEPTION)
        for future in finished:
            future.result()
        counter.show()


class _Counter:
    """How far the work is: a bar on a terminal, else a line now and then."""

    _LINE_SECONDS = 30.0

    def __init__(self, total: int, unit: str, console: rich.console.Console):
        self._total, self._unit, self._console = total, unit, console
        self._done = 0
        self._lock = threading.Lock()
        self._began = self._shown = time.monotonic()
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=20),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn(unit),
            rich.progress.TextColumn("{task.fields[speed]:,.0f}/s"),
            rich.progress.TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, speed=0.0)

    def __enter__(self) -> "_Counter":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def count(self) -> None:
        """One more is being done; called from any thread."""
        with self._lock:
            self._done += 1

    def show(self) -> None:
        """Shows how many are done."""
        now = time.monotonic()
        speed = self._done / max(now - self._began, 1e-3)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._done, speed=speed)
        elif now - self._shown > self._LINE_SECONDS:
            self._shown = now
            say(
                self._console,
                f"{self._done:,} of {self._total:,} {self._unit} · {speed:,.0f}/s",
            )


def say(console: rich.console.Console, text: str) -> None:
    """Prints a line as it is: unwrapped, and without markup in paths."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)
