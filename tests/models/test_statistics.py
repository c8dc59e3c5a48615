"""Batch statistics recomputed as a plain average."""

import jax
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.models import create_model, precise_batch_stats


def batches_of(count, seed=0):
    rng = np.random.default_rng(seed)
    # Batches of different means, so that the order of an average could show.
    return [
        rng.normal(index, 1 + index, (4, 8, 8, 3)).astype(np.float32)
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def net():
    model = create_model("cifar_resnet8")
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3)))
    return model, variables


def test_the_first_normalisation_has_the_mean_of_the_batches_statistics(net):
    model, variables = net
    batches = batches_of(3)
    stats = precise_batch_stats(model, variables, batches)["stem"]["norm"]
    kernel = np.asarray(variables["params"]["stem"]["conv"]["kernel"], np.float64)
    means, variances = [], []
    for images in batches:
        padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(np.float64)
        maps = sum(
            padded[:, i : i + 8, j : j + 8] @ kernel[i, j]
            for i in range(3)
            for j in range(3)
        )
        means.append(maps.mean((0, 1, 2)))
        variances.append(maps.var((0, 1, 2), ddof=1))
    np.testing.assert_allclose(stats["mean"], np.mean(means, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["var"], np.mean(variances, 0), rtol=1e-4)


def test_every_batch_counts_the_same_and_what_was_there_does_not(net):
    model, variables = net
    batches = batches_of(3)
    stats = precise_batch_stats(model, variables, batches)
    changed = jax.tree.map(lambda leaf: leaf + 7, variables["batch_stats"])
    again = precise_batch_stats(
        model, variables | {"batch_stats": changed}, reversed(batches)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        stats,
        again,
    )
    # A moving average of the same batches would have kept 0.9^3 of what was there.
    assert not np.allclose(stats["stem"]["norm"]["var"], 1)


def test_dropping_is_off_and_groups_are_kept(net):
    model, variables = net
    batches = batches_of(2)
    expected = precise_batch_stats(model, variables, batches)
    dropping = model.clone(dropout_rate=0.5, stochastic_depth_rate=0.5)
    found = precise_batch_stats(dropping, variables, batches)
    jax.tree.map(np.testing.assert_array_equal, found, expected)

    grouped = precise_batch_stats(model.clone(batch_norm_groups=2), variables, batches)
    halves = [half for images in batches for half in (images[:2], images[2:])]
    parts = precise_batch_stats(model, variables, halves)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        grouped,
        parts,
    )


def test_refusals(net):
    model, variables = net
    with pytest.raises(UserError, match="over no batches"):
        precise_batch_stats(model, variables, [])
    highway = create_model("cifar_highway19")
    with pytest.raises(UserError, match="HighwayNet has no batch statistics"):
        precise_batch_stats(highway, {"params": {}}, batches_of(1))
