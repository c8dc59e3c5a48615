"""Feeds: batches on the devices, in the order of the run.

A small data set is resident: it lies on the devices whole, and a batch is a handful of
indices. A large one is streamed: threads read, decode and crop ahead of the step. Both
give the same examples; inside the jitted step, ``batch.gather`` makes them look alike.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.config.schema import AugmentationConfig, DataConfig
from resnet_jax.data import order
from resnet_jax.data.batch import Batch, Feed
from resnet_jax.data.dataset import Split


@dataclasses.dataclass(frozen=True)
class ResidentFeed:
    """A split that lies on every device whole; see ``Feed``."""

    resident: Batch
    num_examples: int
    mesh: Mesh

    @classmethod
    def load(cls, split: Split, mesh: Mesh, num_threads: int) -> "ResidentFeed":
        """Decodes the split and puts it on the devices."""
        images, labels = split.arrays(num_threads)
        arrays = {"image": images, "label": labels}
        resident = parallel.place(arrays, parallel.replicated(mesh))
        return cls(resident, len(split), mesh)

    def training_batches(self, position, batch_size, seed):
        """See ``Feed``."""
        sharding = parallel.batch_sharding(self.mesh)
        for start in itertools.count(position, batch_size):
            indices = order.examples_at(start, batch_size, self.num_examples, seed)
            yield parallel.place({"index": indices}, sharding)

    def evaluation_batches(self, batch_size):
        """See ``Feed``."""
        sharding = parallel.batch_sharding(self.mesh)
        for indices, mask in _evaluation_indices(self.num_examples, batch_size):
            yield parallel.place({"index": indices, "mask": mask}, sharding)


@dataclasses.dataclass(frozen=True)
class StreamingFeed:
    """A split that is read while the steps run; see ``Feed``."""

    split: Split
    mesh: Mesh
    augmentation: AugmentationConfig
    num_threads: int
    prefetch_batches: int
    resident: None = None

    @property
    def num_examples(self) -> int:
        """Examples in the split."""
        return len(self.split)

    def training_batches(self, position, batch_size, seed):
        """See ``Feed``."""

        def load(offset: int) -> Batch:
            place = position + offset
            index = order.example_at(place, self.num_examples, seed)
            rng = order.example_generator(place, seed)
            return _example(*self.split.random_example(index, rng, self.augmentation))

        yield from self._stream(load, _ENDLESS, batch_size)

    def evaluation_batches(self, batch_size):
        """See ``Feed``."""
        batches = list(_evaluation_indices(self.num_examples, batch_size))
        indices = np.concatenate([batch[0] for batch in batches])
        mask = np.concatenate([batch[1] for batch in batches])

        def load(offset: int) -> Batch:
            example = _example(*self.split.example(int(indices[offset])))
            return example | {"mask": mask[offset]}

        yield from self._stream(load, len(indices), batch_size)

    def _stream(self, load, length, batch_size):
        import grain  # here, so that the train step can be imported without it

        options = grain.ReadOptions(
            num_threads=self.num_threads,
            prefetch_buffer_size=self.prefetch_batches * batch_size,
        )
        examples = grain.MapDataset.range(length).map(load)
        batches = examples.to_iter_dataset(options).batch(batch_size)
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=2
        )
        sharding = parallel.batch_sharding(self.mesh)
        placed = (parallel.place(batch, sharding) for batch in batches)
        yield from _ahead(placed)


_ENDLESS = 2**62


def _ahead(batches: Iterator[Batch], count: int = 1) -> Iterator[Batch]:
    """Begins the transfer of ``count`` batches before they are asked for."""
    waiting = collections.deque(itertools.islice(batches, count))
    for batch in batches:
        waiting.append(batch)
        yield waiting.popleft()
    yield from waiting


def _example(image: np.ndarray, label: int) -> Batch:
    return {"image": image, "label": np.int32(label)}


def _evaluation_indices(
    num_examples: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices and masks (batch_size,); padding repeats example 0 with mask 0."""
    for start in range(0, num_examples, batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        mask = (indices < num_examples).astype(np.float32)
        yield np.where(mask > 0, indices, 0), mask


def make_feed(
    split: Split, mesh: Mesh, data: DataConfig, augmentation: AugmentationConfig
) -> Feed:
    """The feed that fits a split: resident if it is small enough, else streamed."""
    small = split.nbytes <= data.resident_mib * 2**20
    cropped_here = augmentation.shorter_side is not None
    resident = small and not cropped_here if data.resident is None else data.resident
    if resident:
        return ResidentFeed.load(split, mesh, data.num_threads)
    return StreamingFeed(
        split, mesh, augmentation, data.num_threads, data.prefetch_batches
    )
