"""TensorBoard's file: the rows of metrics.jsonl once more, as curves."""

import contextlib
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from resnet_jax import storage
from resnet_jax.training.tracking import Histogram, TrackedRun, curves


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
    from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

_FLUSH_SECONDS = 10


class TensorBoard:
    """Writes the curves of a run again at each start; a context manager.

    Images and histograms from before this start are copied from the old file. If the
    file cannot be written, the run warns and continues. tensorboardX's SummaryWriter
    would hang: on a full disk its thread dies, and the run waits for it.
    """

    def __init__(self, run: TrackedRun):
        """Opens nothing yet."""
        self._run, self._workdir = run, run.folder
        self._writer: EventsWriter | None = None
        self._open_mirror = contextlib.ExitStack()

    def __enter__(self) -> "TensorBoard":
        folder = self._workdir.tensorboard
        self._mirror = self._open_mirror.enter_context(self._workdir.mirror(folder))
        kept: list[Event] = []
        with storage.reached(folder):
            for file in sorted(folder.glob("events.out.tfevents.*")):
                kept += _pictures_until(self._run.step, file.read_bytes())
                file.unlink()
        self._try(lambda: self._open(kept))
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._try(self._writer.close)
        self._open_mirror.__exit__(*error)

    def add(self, row: dict[str, Any]) -> None:
        """See ``tracking.Tracker``; so do the others."""
        values = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in curves(row).items()
        ]
        self._add(row["step"], values)

    def add_images(self, step: int, images: Mapping[str, bytes]) -> None:
        """See ``Tracker``."""
        values = []
        for name, png in images.items():
            width, height = struct.unpack_from(">II", png, 16)  # of the first chunk
            image = Summary.Image(
                height=height, width=width, colorspace=4, encoded_image_string=png
            )
            values.append(Summary.Value(tag=f"images/{name}", image=image))
        self._add(step, values)

    def add_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """See ``Tracker``."""
        values = []
        for name, (counts, edges) in histograms.items():
            middles = (edges[1:] + edges[:-1]) / 2
            histogram = HistogramProto(
                min=edges[0],
                max=edges[-1],
                num=counts.sum(),
                sum=counts @ middles,
                sum_squares=counts @ middles**2,
                bucket_limit=edges[1:],
                bucket=counts,
            )
            values.append(Summary.Value(tag=f"parameters/{name}", histo=histogram))
        self._add(step, values)

    def add_result(self, result: dict[str, Any]) -> None:
        """The last row has all that TensorBoard shows."""

    def _add(self, step: int, values: list[Any]) -> None:
        if self._writer is not None and values:
            summary = Summary(value=values)
            event = Event(wall_time=time.time(), step=step, summary=summary)
            self._try(lambda: self._write(event))

    def _open(self, kept: list[Any]) -> None:
        self._mirror.path.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(self._mirror.path / "events"))
        self._flushed_at = time.monotonic()
        for event in kept:
            self._writer.write_event(event)
        for row in self._run.rows:
            self.add(row)
        if self._writer is not None:
            self._writer.flush()

    def _write(self, event: Any) -> None:
        assert self._writer is not None
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
            self._run.tell(
                "warning: no more curves for TensorBoard: "
                f"{self._workdir.tensorboard} cannot be written ({error.strerror}); "
                "the next start writes them again"
            )


def _pictures_until(step: int, file: bytes) -> Iterator[Any]:
    """The events of a file that hold images or histograms of steps up to ``step``.

    A file is a row of records: length, checksum, event, checksum. The last one may be
    cut short.
    """
    start = 0
    while start + 8 <= len(file):
        (length,) = struct.unpack_from("<Q", file, start)
        data = file[start + 12 : start + 12 + length]
        start += length + 16
        if start > len(file):
            return
        event = Event.FromString(data)
        has_pictures = any(
            value.WhichOneof("value") in ("image", "histo")
            for value in event.summary.value
        )
        if has_pictures and event.step <= step:
            yield event
