"""The order of training examples, as a stateless function of (seed, epoch).

The position in a run is one number, the global example index: how many examples were
drawn before. A checkpoint needs no more of the data. The example at any position, and
the random numbers of its crop, follow from it on any number of hosts, processes and
threads.
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Order:
    """Maps global example indices to examples.

    Epochs follow each other without a gap, so a batch can span two of them.

    Attributes:
      num_examples: of the data set.
      seed: of the shuffles.
      repeats: how often each example is drawn in a row, to be augmented differently
        each time (Hoffer et al. 2020). An epoch stays as long and sees fewer examples.
      whole_batches_of: a batch size; an epoch ends with its last whole batch, and drops
        the rest. None drops nothing.
    """

    num_examples: int
    seed: int
    repeats: int = 1
    whole_batches_of: int | None = None

    @property
    def epoch_length(self) -> int:
        """Draws per epoch."""
        return self.num_examples - self.num_examples % (self.whole_batches_of or 1)

    def examples(self, position: int, count: int) -> np.ndarray:
        """The ``count`` examples from a global example index on, int32 (count,)."""
        parts = []
        while count > 0:
            epoch, offset = divmod(position, self.epoch_length)
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
        """The random numbers for one example's crop, a function of seed and position.

        Each ``attempt`` at a position, after a broken image, draws other numbers.
        """
        # The high bit keeps this stream apart from the streams of epoch_order.
        bits = _philox(self.seed | 1 << 63, position, counter=attempt)
        return np.random.Generator(bits)


@functools.lru_cache(maxsize=4)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """A uniform permutation of range(num_examples), int64 and read-only.

    It sorts the raw words of a counter-based generator. NumPy guarantees that this
    stream never changes, so an order can be reproduced at any time.
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
