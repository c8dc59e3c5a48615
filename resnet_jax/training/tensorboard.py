"""TensorBoard's file: the rows of metrics.jsonl once more, as curves."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from resnet_jax import distributed, storage
from resnet_jax.workdir import Workdir


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Makes ``import torch`` fail in the block, unless torch is imported already."""
    hidden = sys.modules.setdefault("torch", None) is None  # type: ignore[arg-type]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torch"]


# tensorboardX imports torch if it can, which takes 2.5 s and is not needed here.
with _without_torch():
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

_FLUSH_SECONDS = 10


class TensorBoard:
    """Writes the curves of a run again at each start; a context manager.

    If the file cannot be written, the run warns and continues. tensorboardX's
    SummaryWriter would hang: on a full disk its thread dies, and the run waits for it.
    """

    def __init__(
        self,
        workdir: Workdir,
        rows: Sequence[dict[str, Any]],
        warn: Callable[[str], None],
    ):
        """``rows`` are written at the start; ``warn`` prints a sentence."""
        self._workdir, self._rows, self._warn = workdir, rows, warn
        self._writer: EventsWriter | None = None
        self._open_mirror = contextlib.ExitStack()

    def __enter__(self) -> "TensorBoard":
        folder = self._workdir.tensorboard
        self._mirror = self._open_mirror.enter_context(self._workdir.mirror(folder))
        if distributed.is_primary():
            with storage.reached(folder):
                for file in folder.glob("events.out.tfevents.*"):
                    file.unlink()
            self._try(self._open)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._try(self._writer.close)
        self._open_mirror.__exit__(*error)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row of metrics.jsonl."""
        if self._writer is not None:
            self._try(lambda: self._write(row))

    def _open(self) -> None:
        self._mirror.path.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(self._mirror.path / "events"))
        self._flushed_at = time.monotonic()
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
        summary = Summary(value=values)
        event = Event(wall_time=time.time(), step=row["step"], summary=summary)
        self._writer.write_event(event)
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self._writer.flush()
            self._mirror.copy()
            self._flushed_at = time.monotonic()

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            writer, self._writer = self._writer, None
            # Python would write once more when it frees the file, and print the error.
            with contextlib.suppress(OSError, AttributeError):
                writer._py_recordio_writer.close()  # type: ignore[union-attr]
            self._warn(
                "warning: no more curves for TensorBoard: "
                f"{self._workdir.tensorboard} cannot be written ({error.strerror}); "
                "the next start writes them again"
            )


def tag_of(name: str) -> str:
    """The tag of a metric: ``test_error`` is ``error/test``, so that curves group."""
    split, _, metric = name.partition("_")
    return f"{metric}/{split}" if split in ("train", "holdout", "test") else name
