import numpy as np
import pytest

from resnet_jax.data.order import Order, epoch_order


def order(num_examples, seed, **options):
    return Order(num_examples, seed, **options)


def test_an_epoch_holds_every_example_once():
    for epoch in range(3):
        assert sorted(epoch_order(1000, seed=7, epoch=epoch)) == list(range(1000))


def test_epochs_and_seeds_differ():
    orders = {
        tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_batches_follow_each_other_over_the_end_of_an_epoch():
    drawn = np.concatenate([order(10, 3).examples(i * 4, 4) for i in range(5)])
    assert sorted(drawn[:10]) == list(range(10))
    assert sorted(drawn[10:]) == list(range(10))


def test_a_batch_may_be_longer_than_an_epoch():
    drawn = order(5, 0).examples(2, 11)
    assert len(drawn) == 11
    assert sorted(drawn[3:8]) == list(range(5))


def test_any_position_can_be_had_at_once():
    far = 10**12 + 3
    expected = order(101, 5).examples(far, 6)
    one_by_one = [order(101, 5).examples(far + i, 1)[0] for i in range(6)]
    assert one_by_one == list(expected)


def test_places_of_an_example_are_uniform():
    # Chi-squared of the place of example 0 over 2,000 epochs: 9 degrees of freedom,
    # mean 9, and above 27.9 with probability 0.001.
    places = [int(np.argmin(epoch_order(10, 0, epoch))) for epoch in range(2000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9


def test_an_incomplete_batch_may_be_dropped():
    whole = order(10, 3, whole_batches_of=4)
    first, second = whole.examples(0, 8), whole.examples(8, 8)
    np.testing.assert_array_equal(first, epoch_order(10, 3, 0)[:8])
    np.testing.assert_array_equal(second, epoch_order(10, 3, 1)[:8])


@pytest.mark.parametrize("num_examples", [12, 13])
def test_repeats_follow_each_other_and_the_epoch_stays_as_long(num_examples):
    repeated = order(num_examples, 1, repeats=3)
    drawn = repeated.examples(0, 12)
    np.testing.assert_array_equal(
        drawn, np.repeat(epoch_order(num_examples, 1, 0)[:4], 3)
    )
    next_epoch = repeated.examples(num_examples, 3)
    assert set(next_epoch) == {epoch_order(num_examples, 1, 1)[0]}


def test_crops_draw_by_position_and_seed_alone():
    def first_numbers(position, seed, attempt=0):
        return order(5, seed).generator(position, attempt).random(4)

    first = first_numbers(12, seed=1)
    np.testing.assert_array_equal(first, first_numbers(12, seed=1))
    assert not np.array_equal(first, first_numbers(13, seed=1))
    assert not np.array_equal(first, first_numbers(12, seed=2))
    assert not np.array_equal(first, first_numbers(12, seed=1, attempt=1))
