"""The curves that TensorBoard shows: rows of metrics.jsonl once more."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

_FLUSH_SECONDS = 10


class Curves:
    """TensorBoard's file, written anew from the rows so far; a context manager.

    A killed run's file lacks what was not flushed and may hold steps that will be run
    again. It holds nothing that metrics.jsonl does not: where it cannot be written, a
    warning says so and the run goes on.

    tensorboardX's own SummaryWriter writes in a thread, behind a short queue. A full
    disk ends that thread with a traceback, and the run waits at the queue for ever.
    """

    def __init__(
        self,
        folder: Path | None,
        rows: Sequence[dict[str, Any]],
        warn: Callable[[str], None],
        flushed: Callable[[], None] = lambda: None,
    ):
        """Names the folder; None writes nothing. Calls ``flushed`` now and then."""
        self._folder, self._rows, self._warn = folder, rows, warn
        self._flushed = flushed
        self._writer: EventsWriter | None = None
        self._flushed_at = time.monotonic()

    def __enter__(self) -> "Curves":
        if self._folder is not None:
            self._try(self._open)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writer is not None:
            self._try(self._writer.close)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row of metrics.jsonl."""
        if self._writer is not None:
            self._try(lambda: self._write(row))

    def _open(self) -> None:
        assert self._folder is not None
        self._folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(self._folder / "events"))
        for row in self._rows:
            self._write(row)
        self._writer.flush()

    def _write(self, row: dict[str, Any]) -> None:
        assert self._writer is not None
        values = [
            Summary.Value(tag=tag_of(name), simple_value=value)
            for name, value in row.items()
            if name not in ("step", "seconds")
        ]
        self._writer.write_event(
            Event(
                wall_time=time.time(), step=row["step"], summary=Summary(value=values)
            )
        )
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed()
            self._flushed_at = time.monotonic()

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            self._writer = None
            self._warn(
                f"warning: no more curves for TensorBoard: {self._folder} cannot be "
                f"written to ({error.strerror}); the next start writes them anew"
            )


def tag_of(name: str) -> str:
    """The tag of a metric: ``test_error`` is ``error/test``, so that curves group."""
    split, _, metric = name.partition("_")
    return f"{metric}/{split}" if split in ("train", "holdout", "test") else name
