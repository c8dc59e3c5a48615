"""The order of training examples, as a stateless function of (seed, epoch).

The position in a run is one number, the global example index: how many examples were
drawn before. It is all that a checkpoint has to hold of the data: the example at any
position, and the random numbers of its crop, follow from it at once, on any number of
hosts, processes and threads.
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Order:
    """Which example stands at which global example index.

    Attributes:
      num_examples: of the data set.
      seed: of the shuffles.
      repeats: how often an example follows itself, to be augmented differently each
        time (Hoffer et al. 2020). An epoch stays as long, and sees fewer examples.
      epoch_length: draws an epoch; fewer than ``num_examples`` where the last ones,
        which fill no batch, are left out.
    """

    num_examples: int
    seed: int
    repeats: int
    epoch_length: int

    @classmethod
    def of(
        cls,
        num_examples: int,
        seed: int,
        repeats: int = 1,
        whole_batches_of: int | None = None,
    ) -> "Order":
        """The order of a run.

        Epochs follow each other without a gap: a batch may span two of them. With
        ``whole_batches_of``, an epoch ends with its last whole batch of that size.
        """
        length = num_examples
        if whole_batches_of is not None:
            length -= length % whole_batches_of
        return cls(num_examples, seed, repeats, length)

    def place(self, position: int) -> tuple[int, int]:
        """The epoch of a global example index, and the draws of that epoch before."""
        return divmod(position, self.epoch_length)

    def examples(self, position: int, count: int) -> np.ndarray:
        """The indices of ``count`` examples from a global example index on, int32."""
        parts = []
        while count > 0:
            epoch, offset = self.place(position)
            stop = min(offset + count, self.epoch_length)
            shuffled = epoch_order(self.num_examples, self.seed, epoch)
            if self.repeats == 1:
                parts.append(shuffled[offset:stop])
            else:
                parts.append(shuffled[np.arange(offset, stop) // self.repeats])
            position += stop - offset
            count -= stop - offset
        return np.concatenate(parts).astype(np.int32)

    def generator(self, position: int, attempt: int = 0) -> np.random.Generator:
        """The random numbers of one example's crop: of seed and position alone.

        Each ``attempt`` at a position, after broken images, has numbers of its own.
        """
        # The high bit keeps the stream apart from those of the epochs' orders.
        bits = _philox(self.seed | 1 << 63, position, counter=attempt)
        return np.random.Generator(bits)


@functools.lru_cache(maxsize=4)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """A uniform permutation of range(num_examples), int64 and read-only.

    Made by sorting the raw words of a counter-based generator, whose stream NumPy
    guarantees never to change: an order can be had again in any later year.
    """
    words = _philox(seed, epoch).random_raw(num_examples)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def _philox(high: int, low: int, counter: int = 0) -> np.random.Philox:
    # The counter's highest word: streams of 2**192 blocks each.
    return np.random.Philox(
        key=np.array([high, low], np.uint64), counter=[0, 0, 0, counter]
    )
