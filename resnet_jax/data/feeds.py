"""Feeds: batches on the devices, in the order of the run.

A small data set is resident: it lies on the devices whole, and a batch is a handful of
indices. A large one is streamed: threads, or processes of threads, read, decode and
crop ahead of the step. Both give the same examples; inside the jitted step,
``batch.gather`` makes them look alike.
"""

import collections
import dataclasses
import itertools
from collections.abc import Generator, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.config.schema import AugmentationConfig, Config, DataConfig
from resnet_jax.data.batch import Batch, Feed
from resnet_jax.data.chunks import Chunk, EvaluationChunks, Layout, TrainingChunks, join
from resnet_jax.data.dataset import Dataset, open_dataset
from resnet_jax.data.order import Order
from resnet_jax.data.split import Split
from resnet_jax.errors import UserError

_ENDLESS = 2**62
_READY_BATCHES = 2  # joined and waiting for their transfer


def training_order(
    num_examples: int,
    seed: int,
    batch_size: int,
    data: DataConfig,
    augmentation: AugmentationConfig,
) -> Order:
    """The order of a run's training examples, as its config says."""
    return Order.of(
        num_examples,
        seed,
        augmentation.repeats,
        batch_size if data.partial_batch == "drop" else None,
    )


@dataclasses.dataclass(frozen=True)
class ResidentFeed:
    """A split that lies on every device whole; see ``Feed``."""

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
          UserError: an image is broken and none is to be skipped, or all are broken.
        """
        images, labels, skipped = split.arrays(data.threads)
        broken = labels < 0
        if broken.all():
            raise UserError(f"no image of the {split.name} split can be decoded")
        if broken.any():
            # The next whole one stands in for a broken one, in training.
            whole = np.flatnonzero(~broken)
            place = np.searchsorted(whole, np.flatnonzero(broken)) % len(whole)
            images[broken], labels[broken] = images[whole[place]], labels[whole[place]]
        arrays = {"image": images, "label": labels}
        resident = parallel.place(arrays, parallel.replicated(mesh))
        return cls(resident, broken, skipped, mesh, data, augmentation)

    @property
    def num_examples(self) -> int:
        """Examples in the split, without broken ones."""
        return int((~self.broken).sum())

    def training_batches(self, position, batch_size, seed):
        """See ``Feed``."""
        order = training_order(
            len(self.broken), seed, batch_size, self.data, self.augmentation
        )
        sharding = parallel.batch_sharding(self.mesh)
        rows = _local_rows(batch_size)
        for start in itertools.count(position, batch_size):
            indices = order.examples(start + rows.start, len(rows))
            yield parallel.place({"index": indices}, sharding)

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
    """A split that is read while the steps run; see ``Feed``."""

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
        layout = self._layout(batch_size, self.split.training_shape)
        if self.split.in_memory and not self.augmentation.on_host:
            layout = layout.whole()
        chunks = TrainingChunks(
            self.split,
            self.augmentation,
            training_order(
                len(self.split), seed, batch_size, self.data, self.augmentation
            ),
            position,
            layout,
            skips=self.data.on_error == "skip",
        )
        yield from self._placed(host_batches(chunks, self.data))

    def evaluation_batches(self, batch_size):
        """See ``Feed``."""
        chunks = EvaluationChunks(
            self.split,
            self._layout(batch_size, self.split.image_shape),
            skips=self.data.on_error == "skip",
        )
        count = -(-len(self.split) // batch_size)
        yield from self._placed(host_batches(chunks, self.data, count))

    def _layout(self, batch_size: int, shape: tuple[int, ...]) -> Layout:
        hosts = jax.process_index(), jax.process_count()
        return Layout.of(batch_size, int(np.prod(shape)), *hosts)

    def _placed(self, batches: Generator[Chunk]) -> Generator[Batch]:
        """On the devices, one batch ahead; what was skipped is told as it is used."""
        sharding = parallel.batch_sharding(self.mesh)

        def placed() -> Iterator[tuple[Batch, str]]:
            for batch in batches:
                skipped = batch.pop("skipped")
                yield parallel.place(batch, sharding), skipped

        try:
            for batch, skipped in _ahead(placed()):
                self.skipped.extend(skipped.splitlines())
                yield batch
        finally:
            batches.close()


def host_batches(
    chunks: TrainingChunks | EvaluationChunks,
    data: DataConfig,
    num_batches: int | None = None,
) -> Generator[Chunk]:
    """This host's part of each batch, in order, made ahead by threads or processes.

    Args:
      chunks: a function of the chunk's number, which may be sent to a process.
      data: its threads, processes and batches ahead.
      num_batches: how many there are; None: endless.

    Raises:
      UserError: an image is broken, or a worker process died.
    """
    import grain  # here, so that the train step can be imported without it

    per_batch = chunks.layout.chunks_per_batch
    length = _ENDLESS if num_batches is None else num_batches * per_batch
    ahead = data.prefetch_batches * per_batch
    processes = data.num_processes
    read = grain.ReadOptions(
        num_threads=min(data.threads, ahead),
        prefetch_buffer_size=-(-ahead // max(1, processes)),
    )
    stream = grain.MapDataset.range(length).map(chunks).to_iter_dataset(read)
    if processes:
        _allow_flags()
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=processes, per_worker_buffer_size=1
            )
        )
    stream = stream.batch(per_batch, batch_fn=join)
    iterator = iter(
        grain.experimental.ThreadPrefetchIterDataset(
            stream, prefetch_buffer_size=_READY_BATCHES
        )
    )
    try:
        yield from _told(iterator)
    finally:
        iterator.close()


def _told(batches: Iterator[Chunk]) -> Iterator[Chunk]:
    """The batches; faults of images and workers as UserError."""
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
            f"a process that reads the data died: {cause}; exit code -9 is mostly the "
            "system's, out of memory: lower data.num_processes or data.prefetch_batches"
        ) from error


def _allow_flags() -> None:
    """Grain's processes read absl's flags, which nobody parses in a notebook."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _ahead(
    batches: Iterator[tuple[Batch, str]], count: int = 1
) -> Iterator[tuple[Batch, str]]:
    """Begins the transfer of ``count`` batches before they are asked for."""
    waiting = collections.deque(itertools.islice(batches, count))
    for batch in batches:
        waiting.append(batch)
        yield waiting.popleft()
    yield from waiting


def make_feed(
    split: Split, mesh: Mesh, data: DataConfig, augmentation: AugmentationConfig
) -> Feed:
    """The feed that fits a split: resident if it is small enough, else streamed.

    Training images that change on the host are never resident; a split for evaluation
    may be, whatever the augmentation.
    """
    if is_resident(split, data, augmentation):
        return ResidentFeed.load(split, mesh, data, augmentation)
    return StreamingFeed(split, mesh, data, augmentation)


def is_resident(
    split: Split, data: DataConfig, augmentation: AugmentationConfig
) -> bool:
    """Whether the whole split lies on every device; see ``make_feed``."""
    if data.resident is not None:
        return data.resident
    small = split.nbytes <= data.resident_mib * 2**20
    return small and not (augmentation.on_host and split.name == "train")


class LastDataset:
    """Opens data sets, and keeps the last: runs in a row mostly have the same.

    The images of splits that lie on the devices whole are decoded once for all runs.
    """

    def __init__(self) -> None:
        self._key: tuple[DataConfig, AugmentationConfig] | None = None
        self._dataset: Dataset | None = None

    def open(self, config: Config) -> Dataset:
        """See ``open_dataset``, which it calls where the data are others than before.

        Raises:
          UserError: data are missing, broken or contradict the config.
        """
        key = config.data, config.augmentation
        if self._dataset is None or key != self._key:
            # The old one's images are not to be in memory beside the new one's.
            self._dataset = None
            dataset = open_dataset(config)
            for split in (dataset.train, dataset.holdout, dataset.test):
                if split is not None and is_resident(split, *key):
                    split.keep(config.data.threads)
            self._key, self._dataset = key, dataset
        return self._dataset
