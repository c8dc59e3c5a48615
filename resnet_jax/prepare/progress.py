"""Run work in threads and show its progress."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import rich.console
import rich.progress

from resnet_jax.console import say
from resnet_jax.environment import usable_cores

_LINE_SECONDS = 30.0


def in_threads(
    work: Callable[[Any, Callable[[], None]], None],
    items: Sequence[Any],
    total: int,
    unit: str,
    threads: int | None,
    console: rich.console.Console,
) -> None:
    """Calls ``work(item, tick)`` for all items in threads and shows the progress.

    ``work`` calls ``tick`` regularly, ``total`` times in all for all items. The first
    exception of a call stops the others, by an exception of ``tick``, and is raised. A
    terminal shows a bar; elsewhere a line appears every 30 seconds. ``threads=None``
    means one per processor, and ``unit`` is what a tick counts.
    """
    stop, lock, ticks = threading.Event(), threading.Lock(), 0

    def tick() -> None:
        nonlocal ticks
        if stop.is_set():
            raise futures.CancelledError
        with lock:
            ticks += 1

    bar = rich.progress.Progress(
        rich.progress.BarColumn(bar_width=20),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn(unit),
        rich.progress.TextColumn("{task.fields[speed]:,.0f}/s"),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=total, speed=0.0)
    began = shown = time.monotonic()
    with bar, futures.ThreadPoolExecutor(threads or usable_cores()) as pool:
        waiting = {pool.submit(work, item, tick) for item in items}
        try:
            while waiting:
                finished, waiting = futures.wait(waiting, 0.2, futures.FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                now = time.monotonic()
                speed = ticks / max(now - began, 1e-3)
                bar.update(task, completed=ticks, speed=speed)
                if not console.is_terminal and now - shown > _LINE_SECONDS:
                    shown = now
                    say(console, f"{ticks:,} of {total:,} {unit} · {speed:,.0f}/s")
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
