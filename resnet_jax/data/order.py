"""The order of training examples, as a stateless function of (seed, epoch).

The position in a run is one number, the global example index: how many examples were
drawn before. Epochs follow each other without a gap, so a batch may span two of them
and no example is ever dropped.
"""

import functools

import numpy as np


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


def example_at(position: int, num_examples: int, seed: int) -> int:
    """The index in the training set of the example at a global example index."""
    epoch, offset = divmod(position, num_examples)
    return int(epoch_order(num_examples, seed, epoch)[offset])


def examples_at(position: int, count: int, num_examples: int, seed: int) -> np.ndarray:
    """The indices of ``count`` examples from a global example index on, int32."""
    parts = []
    while count > 0:
        epoch, offset = divmod(position, num_examples)
        part = epoch_order(num_examples, seed, epoch)[offset : offset + count]
        parts.append(part)
        position += len(part)
        count -= len(part)
    return np.concatenate(parts).astype(np.int32)


def example_generator(position: int, seed: int) -> np.random.Generator:
    """The random numbers of one example's crop: of the seed and position alone."""
    # The high bit keeps the stream apart from those of the epochs' orders.
    return np.random.Generator(_philox(seed | 1 << 63, position))


def _philox(high: int, low: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([high, low], np.uint64))
