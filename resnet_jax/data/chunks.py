"""Chunks: what one thread reads, decodes and crops in one call.

A batch is made of a few chunks of consecutive places, so that the cost of handing work
to threads or processes is paid once for dozens of images, and no thread holds more
than a few megabytes. Every chunk is a function of its number alone. This module is
what worker processes import: it touches no device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from resnet_jax.config.schema import AugmentationConfig
from resnet_jax.data.order import Order
from resnet_jax.data.split import Split
from resnet_jax.errors import UserError

Chunk = dict[str, Any]
"""``image`` uint8 (m, h, w, c), ``label`` int32 (m,) and, in evaluation, ``mask``
float32 (m,); ``skipped``: a line a broken image; or else ``error``: a sentence."""

_MAX_IMAGES = 64
_MAX_BYTES = 16 * 2**20

_REPLACEMENTS = 100
"""Tried for a broken image: beyond that the data set is broken."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How global batches are cut into the hosts' parts and those into chunks.

    Attributes:
      batch_size: examples of a global batch.
      host, num_hosts: this process's number and how many share each batch; host k
        makes the k-th part of the rows.
      chunk_size: the most examples of a chunk.
    """

    batch_size: int
    host: int
    num_hosts: int
    chunk_size: int

    @classmethod
    def of(
        cls, batch_size: int, image_nbytes: int, host: int = 0, num_hosts: int = 1
    ) -> "Layout":
        """The layout for images of a size.

        Raises:
          UserError: the hosts cannot share a batch.
        """
        if batch_size % num_hosts:
            raise UserError(
                f"a batch of {batch_size} does not divide over {num_hosts} hosts"
            )
        local = batch_size // num_hosts
        fitting = max(1, min(_MAX_IMAGES, _MAX_BYTES // image_nbytes, local))
        # Chunks of one size keep threads equally long at work.
        number = -(-local // fitting)
        return cls(batch_size, host, num_hosts, -(-local // number))

    def whole(self) -> "Layout":
        """The same with one chunk a batch, for what costs little to make."""
        size = self.batch_size // self.num_hosts
        return dataclasses.replace(self, chunk_size=size)

    @property
    def chunks_per_batch(self) -> int:
        """Chunks of this host in each batch."""
        return -(-(self.batch_size // self.num_hosts) // self.chunk_size)

    def places(self, number: int) -> range:
        """Places of chunk ``number`` among all examples from the first batch on."""
        batch, part = divmod(number, self.chunks_per_batch)
        local = self.batch_size // self.num_hosts
        first = batch * self.batch_size + self.host * local
        start = part * self.chunk_size
        return range(first + start, first + min(start + self.chunk_size, local))


@dataclasses.dataclass(frozen=True)
class TrainingChunks:
    """Chunk ``number`` of the training batches from a global example index on."""

    split: Split
    augmentation: AugmentationConfig
    order: Order
    position: int
    layout: Layout
    skips: bool

    def __call__(self, number: int) -> Chunk:
        """Reads, decodes and crops; a broken image is told, not raised."""
        places = self.layout.places(number)
        first = self.position + places.start
        indices = self.order.examples(first, len(places))
        if not self.augmentation.on_host:
            taken = self.split.take(indices)
            if taken is not None:
                return _chunk(*taken)
        chunk = _empty(len(places), self.split.training_shape)
        skipped: list[str] = []
        for row, index in enumerate(indices):
            try:
                chunk["label"][row] = self._write(
                    int(index), first + row, chunk["image"][row], skipped
                )
            except UserError as error:
                return {"error": str(error)}
        return chunk | {"skipped": "\n".join(skipped)}

    def _write(
        self, index: int, position: int, out: np.ndarray, skipped: list[str]
    ) -> int:
        """Writes the example at a position, or another if it is broken; its label."""
        for attempt in range(1 + _REPLACEMENTS):
            rng = self.order.generator(position, attempt)
            if attempt:
                index = int(rng.integers(self.order.num_examples))
            try:
                return self.split.training_example(index, rng, self.augmentation, out)
            except UserError as error:
                if not self.skips:
                    raise
                skipped.append(str(error))
        raise UserError(f"{skipped[-1]} (so are {_REPLACEMENTS} others in its place)")


@dataclasses.dataclass(frozen=True)
class EvaluationChunks:
    """Chunk ``number`` of a split's batches in order; the last one is padded."""

    split: Split
    layout: Layout
    skips: bool

    def __call__(self, number: int) -> Chunk:
        """Reads and decodes; padding and broken images have mask 0."""
        places = self.layout.places(number)
        chunk = _empty(len(places), self.split.image_shape)
        chunk["mask"] = np.zeros(len(places), np.float32)
        skipped: list[str] = []
        for row, index in enumerate(places):
            if index >= len(self.split):
                break
            try:
                chunk["image"][row], chunk["label"][row] = self.split.example(index)
            except UserError as error:
                if not self.skips:
                    return {"error": str(error)}
                skipped.append(str(error))
            else:
                chunk["mask"][row] = 1
        return chunk | {"skipped": "\n".join(skipped)}


def join(chunks: Sequence[Chunk]) -> Chunk:
    """The chunks of a batch as one; the first one's error if there is any."""
    for chunk in chunks:
        if "error" in chunk:
            return chunk
    if len(chunks) == 1:
        return chunks[0]
    arrays = {
        name: np.concatenate([chunk[name] for chunk in chunks])
        for name in chunks[0]
        if name != "skipped"
    }
    skipped = [chunk["skipped"] for chunk in chunks if chunk["skipped"]]
    return arrays | {"skipped": "\n".join(skipped)}


def _chunk(images: np.ndarray, labels: np.ndarray) -> Chunk:
    return {"image": images, "label": labels.astype(np.int32), "skipped": ""}


def _empty(count: int, shape: tuple[int, ...]) -> Chunk:
    # Rows that stay empty, padding for example, are black and of class 0.
    return {
        "image": np.zeros((count, *shape), np.uint8),
        "label": np.zeros(count, np.int32),
    }
