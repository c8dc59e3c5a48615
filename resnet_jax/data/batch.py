"""What a batch is, and what gives batches; imported by the jitted steps."""

from collections.abc import Generator, Iterator
from typing import Any, Protocol

import jax

Batch = dict[str, Any]
"""``label`` or ``index`` (n,), ``image`` (n, h, w, c) where streamed, ``mask`` (n,)
in evaluation: 1 for an example, 0 for padding."""


class Feed(Protocol):
    """Batches of one split."""

    @property
    def resident(self) -> Batch | None:
        """The arrays to pass to every step beside the batch; None if streamed."""
        ...

    @property
    def num_examples(self) -> int:
        """Examples that an evaluation counts, broken ones that are skipped included
        where only reading tells them.
        """
        ...

    @property
    def skipped(self) -> list[str]:
        """A sentence each time that a broken image was skipped so far."""
        ...

    def training_batches(
        self, position: int, batch_size: int, seed: int
    ) -> Generator[Batch]:
        """Endless batches from a global example index on."""
        ...

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, in order; the last batch is padded and masked."""
        ...


def gather(resident: Batch | None, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Uint8 images (n, h, w, c) and labels (n,) of a batch; inside jit."""
    if resident is None:
        return batch["image"], batch["label"]
    return resident["image"][batch["index"]], resident["label"][batch["index"]]
