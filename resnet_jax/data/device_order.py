"""The order of training examples, computed on the device: that of ``order``, by jax.

Every index is the one that ``order.Order.examples`` gives on the host, bit for bit:
words of the counter-based generator Philox 4x64-10 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"), as NumPy draws them, sorted stably. jax has no
64-bit integers unless told so for the whole process; here they are pairs of uint32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_LOW_HALF = 0xFFFF


class Place(NamedTuple):
    """Where a run stands in its order; scalars, which may be traced.

    Attributes:
      seed: of the shuffles, in [0, 2**32).
      epoch: in [0, 2**31), so that no run is too long for its int32.
      offset: draws of the epoch before this place.
    """

    seed: Any
    epoch: Any
    offset: Any


class _Word(NamedTuple):
    """64 bits: two uint32 arrays of one shape."""

    high: jax.Array
    low: jax.Array

    def __xor__(self, other: "_Word") -> "_Word":
        return _Word(self.high ^ other.high, self.low ^ other.low)


def examples(
    place: Place, count: int, num_examples: int, epoch_length: int, repeats: int = 1
) -> jax.Array:
    """The indices of ``count`` examples from a place of the order on, int32 (count,).

    Args:
      place: of the first one.
      count: static, as are the numbers that follow; ``epoch_length + count`` stays
        below 2**31.
      num_examples: of the data set.
      epoch_length: draws an epoch, as ``order.Order`` has it.
      repeats: how often an example follows itself.
    """
    # The most epochs that so many draws can touch: they begin at an epoch's last one.
    num_epochs = 1 + (epoch_length + count - 2) // epoch_length
    epochs = place.epoch + jnp.arange(num_epochs, dtype=jnp.int32)
    orders = jax.vmap(lambda epoch: epoch_order(place.seed, epoch, num_examples))(
        epochs
    )
    draws = place.offset + jnp.arange(count, dtype=jnp.int32)
    return orders[draws // epoch_length, draws % epoch_length // repeats]


def epoch_order(seed: Any, epoch: Any, num_examples: int) -> jax.Array:
    """The permutation of ``order.epoch_order``, int32 (num_examples,)."""
    words = philox_words(seed, epoch, num_examples)
    indices = jnp.arange(num_examples, dtype=jnp.int32)
    # The index as the last key: what a stable sort does with equal words.
    return lax.sort((words.high, words.low, indices), num_keys=3, is_stable=False)[2]


def philox_words(seed: Any, epoch: Any, count: int) -> _Word:
    """The first words of NumPy's ``Philox(key=[seed, epoch])``, each half (count,)."""
    num_blocks = -(-count // 4)
    # NumPy counts up before it draws: its first block is that of counter 1.
    blocks = 1 + jnp.arange(num_blocks, dtype=jnp.uint32)
    zero = _Word(jnp.zeros_like(blocks), jnp.zeros_like(blocks))
    counter = (_Word(zero.high, blocks), zero, zero, zero)
    key = tuple(
        _Word(jnp.zeros((), jnp.uint32), jnp.asarray(half, jnp.uint32))
        for half in (seed, epoch)
    )

    def one_round(_, counter_and_key):
        counter, key = counter_and_key
        high_0, low_0 = _multiply(counter[0], _MULTIPLIERS[0])
        high_1, low_1 = _multiply(counter[2], _MULTIPLIERS[1])
        counter = (
            high_1 ^ counter[1] ^ key[0],
            low_1,
            high_0 ^ counter[3] ^ key[1],
            low_0,
        )
        return counter, (_add(key[0], _KEY_STEPS[0]), _add(key[1], _KEY_STEPS[1]))

    # A loop: unrolled, XLA would compile it for minutes on the CPU.
    counter, _ = lax.fori_loop(0, _ROUNDS, one_round, (counter, key))
    high = jnp.stack([word.high for word in counter], axis=1)
    low = jnp.stack([word.low for word in counter], axis=1)
    return _Word(high.reshape(-1)[:count], low.reshape(-1)[:count])


def _constant(number: int) -> tuple[jax.Array, jax.Array]:
    return jnp.uint32(number >> 32), jnp.uint32(number & 0xFFFFFFFF)


def _add(word: _Word, number: int) -> _Word:
    """The sum modulo 2**64."""
    high, low = _constant(number)
    total = word.low + low
    carry = (total < low).astype(jnp.uint32)
    return _Word(word.high + high + carry, total)


def _multiply(word: _Word, number: int) -> tuple[_Word, _Word]:
    """The upper and the lower 64 bits of a product."""
    high, low = _constant(number)
    low_low = _multiply_halves(word.low, low)
    low_high = _multiply_halves(word.low, high)
    high_low = _multiply_halves(word.high, low)
    high_high = _multiply_halves(word.high, high)
    # Columns of 32 bits, from the right, each with what the one before carries.
    second, carry = _sum(low_low.high, low_high.low, high_low.low)
    third, carry = _sum(low_high.high, high_low.high, high_high.low, carry)
    return _Word(high_high.high + carry, third), _Word(second, low_low.low)


def _sum(first: jax.Array, *others: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lower 32 bits of a sum, and what it carries."""
    total, carry = first, jnp.zeros_like(first)
    for other in others:
        total = total + other
        carry = carry + (total < other).astype(jnp.uint32)
    return total, carry


def _multiply_halves(a: jax.Array, b: jax.Array) -> _Word:
    """The 64 bits of a product of two uint32."""
    a_high, a_low = a >> 16, a & _LOW_HALF
    b_high, b_low = b >> 16, b & _LOW_HALF
    low, middle_1, middle_2, high = (
        a_low * b_low,
        a_high * b_low,
        a_low * b_high,
        a_high * b_high,
    )
    # Each addend is below 2**16, or a product of two such: the sum fits.
    column = (low >> 16) + (middle_1 & _LOW_HALF) + (middle_2 & _LOW_HALF)
    upper = high + (middle_1 >> 16) + (middle_2 >> 16) + (column >> 16)
    return _Word(upper, (column << 16) | (low & _LOW_HALF))
