"""Batches, and the protocol of what feeds them to a jitted step."""

from collections.abc import Generator, Iterator
from typing import Any, Protocol

import jax

Batch = dict[str, Any]
"""``index`` (n,) into resident arrays, or ``image`` (n, h, w, c) and ``label`` (n,).

In evaluation also ``mask`` (n,): 1 for an example, 0 for padding."""


class Feed(Protocol):
    """Batches of one split."""

    @property
    def resident(self) -> Batch | None:
        """The arrays that every step takes beside the batch; None if streamed."""

    @property
    def num_examples(self) -> int:
        """Examples that an evaluation counts; broken ones too if streamed."""

    @property
    def skipped(self) -> list[str]:
        """One sentence for each time a broken image was skipped."""

    def training_batches(
        self, position: int, batch_size: int, seed: int
    ) -> Generator[Batch]:
        """Endless batches, starting at a global example index."""

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, in order; the last batch is padded and masked."""


def gather(resident: Batch | None, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Uint8 images (n, h, w, c) and labels (n,) of a batch; inside jit."""
    if resident is None:
        return batch["image"], batch["label"]
    return resident["image"][batch["index"]], resident["label"][batch["index"]]
