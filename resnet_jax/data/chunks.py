"""Chunks: the part of a batch that one thread reads, decodes and crops in one call.

A batch consists of a few chunks of consecutive examples. Dozens of images per chunk
make the cost of handing work to threads or processes small. Every chunk is a function
of its number alone. Worker processes import this module, so it uses no device.
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
"""``image`` uint8 (m, h, w, c), ``label`` int32 (m,), in evaluation ``mask`` float32
(m,), and ``skipped``, one line for each broken image; or only ``error``, a sentence."""

_MAX_IMAGES = 64
_MAX_BYTES = 16 * 2**20

_REPLACEMENTS = 100  # attempts to replace a broken image before the run stops


@dataclasses.dataclass(frozen=True)
class Layout:
    """Division of a global batch into the hosts' parts, and of those into chunks.

    Attributes:
      batch_size: examples in a global batch.
      host: index of this process; host k makes the k-th part of the rows.
      num_hosts: number of processes.
      chunk_size: maximum number of examples in a chunk.
    """

    batch_size: int
    host: int
    num_hosts: int
    chunk_size: int

    @classmethod
    def of(
        cls, batch_size: int, image_nbytes: int, host: int = 0, num_hosts: int = 1
    ) -> "Layout":
        """The layout for images of ``image_nbytes`` bytes.

        Raises:
          UserError: the hosts do not divide the batch.
        """
        if batch_size % num_hosts:
            raise UserError(
                f"a batch of {batch_size} is not divisible by {num_hosts} hosts"
            )
        local = batch_size // num_hosts
        fitting = max(1, min(_MAX_IMAGES, _MAX_BYTES // image_nbytes, local))
        # Chunks of equal size keep threads busy equally long.
        number = -(-local // fitting)
        return cls(batch_size, host, num_hosts, -(-local // number))

    @property
    def host_size(self) -> int:
        """Examples in this host's part of a batch."""
        return self.batch_size // self.num_hosts

    @property
    def chunks_per_batch(self) -> int:
        """Number of this host's chunks in a batch."""
        return -(-self.host_size // self.chunk_size)

    def places(self, number: int) -> range:
        """Positions of the examples of chunk ``number``, counted from batch 0."""
        batch, part = divmod(number, self.chunks_per_batch)
        first = batch * self.batch_size + self.host * self.host_size
        start = part * self.chunk_size
        return range(first, first + self.host_size)[start : start + self.chunk_size]


@dataclasses.dataclass(frozen=True)
class TrainingChunks:
    """Makes chunk ``number`` of the training batches that start at ``position``."""

    split: Split
    augmentation: AugmentationConfig
    order: Order
    position: int
    layout: Layout
    skips: bool

    def __call__(self, number: int) -> Chunk:
        """Reads, decodes and crops; a broken image is returned as an error string."""
        places = self.layout.places(number)
        first = self.position + places.start
        indices = self.order.examples(first, len(places))
        if not self.augmentation.on_host:
            taken = self.split.take(indices)
            if taken is not None:
                labels = taken[1].astype(np.int32)
                return {"image": taken[0], "label": labels, "skipped": ""}
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
        """Writes an example, or a replacement if it is broken; returns the label."""
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
        raise UserError(f"{skipped[-1]}; {_REPLACEMENTS} replacements are broken too")


@dataclasses.dataclass(frozen=True)
class EvaluationChunks:
    """Makes chunk ``number`` of a split's batches, in order; pads the last one."""

    split: Split
    layout: Layout
    skips: bool

    def __call__(self, number: int) -> Chunk:
        """Reads and decodes; the mask is 0 for padding and broken images."""
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
    """Joins the chunks of a batch; returns the first error if there is one."""
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


def _empty(count: int, shape: tuple[int, ...]) -> Chunk:
    # Unused rows, such as padding, are black images of class 0.
    return {
        "image": np.zeros((count, *shape), np.uint8),
        "label": np.zeros(count, np.int32),
    }
