"""Bit for bit the host's order, which NumPy's generator and sort make."""

import functools

import jax
import numpy as np
import pytest

from resnet_jax.data import device_order
from resnet_jax.data.device_order import Place
from resnet_jax.data.order import Order, epoch_order

LARGEST = 2**31 - 1


@pytest.mark.parametrize("epoch", [0, 1, 77, LARGEST])
@pytest.mark.parametrize("seed", [0, 5, LARGEST, 2**32 - 1])
def test_words_are_numpys(seed, epoch):
    found = device_order.philox_words(np.uint32(seed), np.int32(epoch), 11)
    expected = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(11)
    joined = np.asarray(found.high, np.uint64) << 32 | np.asarray(found.low, np.uint64)
    np.testing.assert_array_equal(joined, expected)


@pytest.mark.parametrize("num_examples", [1, 2, 1437, 50_000])
def test_an_epoch_is_the_hosts(num_examples):
    found = device_order.epoch_order(np.uint32(3), np.int32(9), num_examples)
    np.testing.assert_array_equal(found, epoch_order(num_examples, 3, 9))


def test_equal_words_keep_their_order(monkeypatch):
    """Real words are never equal in a test's time: here all are, but for two."""
    high = np.array([4, 4, 1, 4, 4], np.uint32)
    low = np.array([2, 2, 3, 1, 2], np.uint32)
    monkeypatch.setattr(
        device_order, "philox_words", lambda *_: device_order._Word(high, low)
    )
    found = device_order.epoch_order(0, 0, 5)
    np.testing.assert_array_equal(found, [2, 3, 0, 1, 4])


def indices(order, position, count):
    """Of a jitted call, with everything that changes in a run traced."""
    epoch, offset = order.place(position)
    function = functools.partial(
        device_order.examples,
        count=count,
        num_examples=order.num_examples,
        epoch_length=order.epoch_length,
        repeats=order.repeats,
    )
    place = Place(np.uint32(order.seed), np.int32(epoch), np.int32(offset))
    return jax.jit(function)(place)


@pytest.mark.parametrize(
    "order",
    [
        Order.of(10, seed=3),
        Order.of(10, seed=3, whole_batches_of=4),
        Order.of(13, seed=1, repeats=3),
        Order.of(13, seed=1, repeats=3, whole_batches_of=6),
        Order.of(1, seed=2),
    ],
)
# Within an epoch, up to its last example, and over two, three and more of them.
@pytest.mark.parametrize("count", [1, 4, 12, 25])
def test_examples_are_the_hosts_at_any_place(order, count):
    for position in (0, 1, 9, 12, 1003):
        found = indices(order, position, count)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, order.examples(position, count))


def test_positions_beyond_32_bits_are_the_hosts():
    order = Order.of(101, seed=5)
    position = 10**11 + 3
    np.testing.assert_array_equal(
        indices(order, position, 300), order.examples(position, 300)
    )
