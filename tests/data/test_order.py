import numpy as np

from resnet_jax.data.order import (
    epoch_order,
    example_at,
    example_generator,
    examples_at,
)


def test_an_epoch_holds_every_example_once():
    for epoch in range(3):
        order = epoch_order(1000, seed=7, epoch=epoch)
        assert sorted(order) == list(range(1000))


def test_epochs_and_seeds_differ():
    orders = {
        tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_batches_follow_each_other_over_the_end_of_an_epoch():
    num_examples, batch = 10, 4
    drawn = np.concatenate(
        [examples_at(i * batch, batch, num_examples, seed=3) for i in range(5)]
    )
    assert sorted(drawn[:10]) == list(range(10))
    assert sorted(drawn[10:]) == list(range(10))


def test_a_batch_may_be_longer_than_an_epoch():
    drawn = examples_at(2, 11, 5, seed=0)
    assert len(drawn) == 11
    assert sorted(drawn[3:8]) == list(range(5))


def test_any_position_can_be_had_at_once():
    far = 10**12 + 3
    expected = examples_at(far, 6, 101, seed=5)
    assert [example_at(far + i, 101, seed=5) for i in range(6)] == list(expected)


def test_places_of_an_example_are_uniform():
    # Chi-squared of the place of example 0 over 2,000 epochs: 9 degrees of freedom,
    # mean 9, and above 27.9 with probability 0.001.
    places = [int(np.argmin(epoch_order(10, 0, epoch))) for epoch in range(2000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9


def test_crops_draw_by_position_and_seed_alone():
    first = example_generator(12, seed=1).random(4)
    np.testing.assert_array_equal(first, example_generator(12, seed=1).random(4))
    assert not np.array_equal(first, example_generator(13, seed=1).random(4))
    assert not np.array_equal(first, example_generator(12, seed=2).random(4))
