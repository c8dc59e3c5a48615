"""Feeds: batches on the devices, in the order of the run.

A small data set is resident: it is on the devices whole, and a batch is only indices. A
large one is streamed: threads, or processes of threads, read, decode and crop ahead of
the step. Both give the same examples; ``batch.gather`` hides the difference from the
jitted step.
"""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.config.schema import AugmentationConfig, Config, DataConfig
from resnet_jax.data.batch import Batch, Feed
from resnet_jax.data.chunks import Chunk, EvaluationChunks, Layout, TrainingChunks, join
from resnet_jax.data.dataset import Dataset, open_dataset
from resnet_jax.data.order import Order
from resnet_jax.data.split import Split
from resnet_jax.errors import UserError
from resnet_jax.signals import STOP_SIGNALS

_ENDLESS = 2**62
_QUIET = "ignore:resource_tracker:UserWarning"  # for processes started later
_READY_BATCHES = 2  # joined, waiting for their transfer to the devices


def training_order(
    num_examples: int,
    seed: int,
    batch_size: int,
    data: DataConfig,
    augmentation: AugmentationConfig,
) -> Order:
    """The order of the training examples that a config describes."""
    whole_batches_of = batch_size if data.partial_batch == "drop" else None
    return Order(num_examples, seed, augmentation.repeats, whole_batches_of)


@dataclasses.dataclass(frozen=True)
class ResidentFeed:
    """A split that is on every device whole; see ``Feed``."""

    resident: Batch
    broken: np.ndarray
    skipped: list[str]
    mesh: Mesh
    data: DataConfig
    augmentation: AugmentationConfig

    @classmethod
    def load(
        cls,
        split: Split,
        mesh: Mesh,
        data: DataConfig,
        augmentation: AugmentationConfig,
    ) -> "ResidentFeed":
        """Decodes the split and puts it on the devices.

        Raises:
          UserError: an image is broken and the config skips none, or all are broken.
        """
        images, labels, skipped = split.arrays(data.threads)
        broken = labels < 0
        if broken.all():
            raise UserError(f"no image of the {split.name} split can be decoded")
        if broken.any():
            # In training, the next whole image replaces a broken one.
            whole = np.flatnonzero(~broken)
            place = np.searchsorted(whole, np.flatnonzero(broken)) % len(whole)
            images[broken], labels[broken] = images[whole[place]], labels[whole[place]]
        arrays = {"image": images, "label": labels}
        resident = parallel.place(arrays, parallel.replicated(mesh))
        return cls(resident, broken, skipped, mesh, data, augmentation)

    @property
    def num_examples(self) -> int:
        """Examples in the split that are not broken."""
        return int((~self.broken).sum())

    def _order(self, batch_size: int, seed: int) -> Order:
        size = len(self.broken)
        return training_order(size, seed, batch_size, self.data, self.augmentation)

    def training_batches(self, position, batch_size, seed):
        """See ``Feed``."""
        order = self._order(batch_size, seed)
        sharding = parallel.batch_sharding(self.mesh)
        rows = _local_rows(batch_size)
        for start in itertools.count(position, batch_size):
            indices = order.examples(start + rows.start, len(rows))
            yield parallel.place({"index": indices}, sharding)

    def training_indices(
        self, position: int, steps: int, batch_size: int, seed: int
    ) -> jax.Array:
        """The indices of several training batches, int32 (steps, batch_size)."""
        rows = _local_rows(batch_size)
        indices = self._order(batch_size, seed).examples(position, steps * batch_size)
        local = indices.reshape(steps, batch_size)[:, rows.start : rows.stop]
        return parallel.place(local, parallel.steps_sharding(self.mesh))

    def evaluation_batches(self, batch_size):
        """See ``Feed``."""
        sharding = parallel.batch_sharding(self.mesh)
        rows = _local_rows(batch_size)
        total = len(self.broken)
        for start in range(0, total, batch_size):
            indices = np.arange(start + rows.start, start + rows.stop, dtype=np.int32)
            inside = indices < total
            indices = np.where(inside, indices, 0)
            mask = (inside & ~self.broken[indices]).astype(np.float32)
            yield parallel.place({"index": indices, "mask": mask}, sharding)


def _local_rows(batch_size: int) -> range:
    """This process's rows of every global batch."""
    local = batch_size // jax.process_count()
    first = jax.process_index() * local
    return range(first, first + local)


@dataclasses.dataclass(frozen=True)
class StreamingFeed:
    """A split that is read while training runs; see ``Feed``."""

    split: Split
    mesh: Mesh
    data: DataConfig
    augmentation: AugmentationConfig
    skipped: list[str] = dataclasses.field(default_factory=list)
    resident: None = None

    @property
    def num_examples(self) -> int:
        """Examples in the split."""
        return len(self.split)

    def training_batches(self, position, batch_size, seed):
        """See ``Feed``."""
        split, data, augmentation = self.split, self.data, self.augmentation
        layout = batch_layout(batch_size, split.training_shape)
        if split.in_memory and not augmentation.on_host:
            # Copying rows is cheap: one chunk per batch.
            layout = dataclasses.replace(layout, chunk_size=layout.host_size)
        order = training_order(len(split), seed, batch_size, data, augmentation)
        skips = data.on_error == "skip"
        chunks = TrainingChunks(split, augmentation, order, position, layout, skips)
        yield from placed(host_batches(chunks, data), self.mesh, self.skipped)

    def evaluation_batches(self, batch_size):
        """See ``Feed``."""
        layout = batch_layout(batch_size, self.split.image_shape)
        skips = self.data.on_error == "skip"
        chunks = EvaluationChunks(self.split, layout, skips)
        count = -(-len(self.split) // batch_size)
        batches = host_batches(chunks, self.data, count)
        yield from placed(batches, self.mesh, self.skipped)


def placed(
    batches: Generator[Chunk], mesh: Mesh, skipped: list[str]
) -> Generator[Batch]:
    """Batches on the devices, one ahead; appends to ``skipped`` what each skipped."""
    sharding = parallel.batch_sharding(mesh)

    def ahead() -> Iterator[tuple[Batch, str]]:
        for batch in batches:
            faults = batch.pop("skipped")
            yield parallel.place(batch, sharding), faults
        yield {}, ""  # the last batch has nothing ahead of it

    try:
        for (batch, faults), _ in itertools.pairwise(ahead()):
            skipped.extend(faults.splitlines())
            yield batch
    finally:
        batches.close()


def batch_layout(batch_size: int, shape: tuple[int, ...]) -> Layout:
    """The chunks of a global batch of images (h, w, c) that this process reads."""
    hosts = jax.process_index(), jax.process_count()
    return Layout.of(batch_size, int(np.prod(shape)), *hosts)


class Chunks(Protocol):
    """Makes the chunks of batches; can be sent to a process."""

    @property
    def layout(self) -> Layout:
        """The division of a batch."""

    def __call__(self, number: int) -> Chunk:
        """Reads chunk ``number``."""


def host_batches(
    chunks: Chunks,
    data: DataConfig,
    num_batches: int | None = None,
) -> Generator[Chunk]:
    """This host's part of each batch, in order; see ``read_ahead``.

    ``num_batches`` is None for an endless feed.
    """
    per_batch = chunks.layout.chunks_per_batch
    length = _ENDLESS if num_batches is None else num_batches * per_batch
    ahead = data.prefetch_batches * per_batch
    return read_ahead(
        chunks,
        length,
        ahead,
        data,
        lambda stream: stream.batch(per_batch, batch_fn=join),
    )


def read_ahead(
    read: Callable[[int], dict[str, Any]],
    length: int,
    ahead: int,
    data: DataConfig,
    gather: Callable[[Any], Any] = lambda stream: stream,
) -> Generator[dict[str, Any]]:
    """``read(0)``, ``read(1)``, ... in order, computed by threads or processes.

    Args:
      read: can be sent to a process. It may return {"error": sentence}.
      length: the number of calls.
      ahead: results that wait at most.
      data: its threads and processes.
      gather: a last operation on Grain's stream, such as batching.

    Raises:
      UserError: an error that was read, or a worker process died.
    """
    import grain  # So that the training step can be imported without grain.

    processes = data.num_processes
    options = grain.ReadOptions(
        num_threads=min(data.threads, ahead),
        prefetch_buffer_size=-(-ahead // max(1, processes)),
    )
    stream = grain.MapDataset.range(length).map(read).to_iter_dataset(options)
    if processes:
        if not flags.FLAGS.is_parsed():  # Grain reads absl's flags; notebooks do not
            flags.FLAGS.mark_as_parsed()
        # When a run is stopped, Python frees the memory that it shared, and warns.
        if _QUIET not in sys.warnoptions:
            sys.warnoptions.append(_QUIET)
        workers = grain.MultiprocessingOptions(processes)
        stream = stream.mp_prefetch(workers, worker_init_fn=_end_with_parent)
    prefetch = grain.experimental.ThreadPrefetchIterDataset
    iterator = iter(prefetch(gather(stream), prefetch_buffer_size=_READY_BATCHES))
    # Threads and processes inherit the mask: Ctrl-C and SIGTERM, which reach a whole
    # group of processes, are for the run to hear and not for its workers.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        iterator.start_prefetch()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield from _checked(iterator)
    finally:
        iterator.close()


def _end_with_parent(*_: int) -> None:
    """Makes a worker process end when the run does, even if the run was killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _checked(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What was read; raises UserError for faults of images and workers."""
    try:
        for batch in batches:
            if "error" in batch:
                raise UserError(batch["error"])
            yield batch
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        cause = str(error).split(". ")[0]
        raise UserError(
            f"a process that reads the data died: {cause}; exit code -9 usually means "
            "out of memory: lower data.num_processes or data.prefetch_batches"
        ) from error


def make_feed(
    split: Split, mesh: Mesh, data: DataConfig, augmentation: AugmentationConfig
) -> Feed:
    """A resident feed if the split is small enough, else a streaming one.

    Training images that the host augments are never resident. Splits for evaluation can
    be, whatever the augmentation.
    """
    if is_resident(split, data, augmentation):
        return ResidentFeed.load(split, mesh, data, augmentation)
    return StreamingFeed(split, mesh, data, augmentation)


def is_resident(
    split: Split, data: DataConfig, augmentation: AugmentationConfig
) -> bool:
    """Whether the whole split goes on every device; see ``make_feed``."""
    if data.resident is not None:
        return data.resident
    small = split.nbytes <= data.resident_mib * 2**20
    return small and not (augmentation.on_host and split.name == "train")


class LastDataset:
    """Opens data sets and keeps the last one: runs in a row mostly share it.

    The images of resident splits are decoded once for all runs.
    """

    def __init__(self) -> None:
        self._key: tuple[DataConfig, AugmentationConfig] | None = None
        self._dataset: Dataset | None = None

    def open(self, config: Config) -> Dataset:
        """The data of a config, as ``open_dataset`` returns them.

        Raises:
          UserError: data are missing, broken or contradict the config.
        """
        key = config.data, config.augmentation
        if self._dataset is None or key != self._key:
            # Free the old images before the new ones are decoded.
            self._dataset = None
            dataset = open_dataset(config)
            for split in (dataset.train, dataset.holdout, dataset.test):
                if split is not None and is_resident(split, *key):
                    split.keep(config.data.threads)
            self._key, self._dataset = key, dataset
        return self._dataset
