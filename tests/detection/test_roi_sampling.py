"""What a training step samples: counts, chances, and the same ones in any padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection.sampling import sample

KEY = jax.random.key(0)


def labels_of(positives, negatives, ignored):
    labels = np.repeat(np.int32([1, 0, -1]), [positives, negatives, ignored])
    return np.random.default_rng(0).permutation(labels)


@pytest.mark.parametrize(
    ("there", "sampled"),
    [
        ((20, 50, 30), (4, 12)),  # positives are cut at a quarter
        ((2, 50, 30), (2, 14)),  # negatives fill up
        ((20, 5, 30), (4, 5)),  # too few of both: slots stay unused
        ((0, 50, 0), (0, 16)),
        ((20, 0, 0), (4, 0)),
        ((0, 0, 9), (0, 0)),
        ((3, 4, 0), (3, 4)),  # fewer entries than slots
    ],
)
def test_counts(there, sampled):
    labels = labels_of(*there)
    indices, drawn = (np.asarray(x) for x in sample(KEY, labels, 16, 0.25))
    assert (indices.dtype, drawn.dtype) == (np.int32, np.int32)
    positives, negatives = sampled
    unused = 16 - positives - negatives
    np.testing.assert_array_equal(
        drawn, np.repeat([1, 0, -1], [positives, negatives, unused])
    )
    used = indices[drawn >= 0]
    assert len(set(used.tolist())) == len(used)
    np.testing.assert_array_equal(labels[used], drawn[drawn >= 0])
    assert not indices[drawn < 0].any()


def test_each_entry_has_the_same_chance():
    labels = labels_of(10, 30, 5)
    keys = jax.random.split(KEY, 4000)
    draw = jax.jit(jax.vmap(lambda key: sample(key, labels, 12, 0.5)))
    indices, _ = draw(keys)
    chance = np.bincount(np.ravel(indices), minlength=45) / 4000
    # Six of 10 and six of 30; five standard deviations of 4000 draws.
    for value, expected in ((1, 0.6), (0, 0.2), (-1, 0)):
        deviation = np.sqrt(expected * (1 - expected) / 4000)
        assert abs(chance[labels == value] - expected).max() <= 5 * deviation


def test_padding_does_not_change_the_sample():
    labels = labels_of(20, 40, 10)
    indices, drawn = sample(KEY, labels, 16, 0.5)
    longer = np.concatenate([labels, np.full(33, -1, np.int32)])
    np.testing.assert_array_equal(sample(KEY, longer, 16, 0.5)[0], indices)

    # Entries that go between the others keep their numbers by their places.
    spread = np.full(200, -1, np.int32)
    where = np.sort(np.random.default_rng(1).choice(200, labels.size, replace=False))
    spread[where] = labels
    places = np.full(200, 1000, np.int32)
    places[where] = np.arange(labels.size)
    moved, same = sample(KEY, jnp.asarray(spread), 16, 0.5, jnp.asarray(places))
    np.testing.assert_array_equal(same, drawn)
    np.testing.assert_array_equal(moved, where[indices])


def test_another_key_draws_others():
    labels = labels_of(20, 40, 10)
    others = sample(jax.random.key(1), labels, 16, 0.5)[0]
    assert set(others.tolist()) != set(sample(KEY, labels, 16, 0.5)[0].tolist())
