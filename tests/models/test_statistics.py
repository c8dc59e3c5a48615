"""Batch statistics recomputed as a plain average."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.errors import UserError
from resnet_jax.models import (
    BatchNorm,
    create_model,
    precise_batch_stats,
    stack_blocks,
    unstack_blocks,
)


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


def first_maps(variables, images):
    """What the first normalisation meets, in float64."""
    kernel = np.asarray(variables["params"]["stem"]["conv"]["kernel"], np.float64)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(np.float64)
    return sum(
        padded[:, i : i + 8, j : j + 8] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_the_first_normalisation_has_mean_and_variance_of_all_values(net, groups):
    model, variables = net
    batches = batches_of(3)
    found = precise_batch_stats(
        model.clone(norm=functools.partial(BatchNorm, groups=groups)),
        variables,
        batches,
    )["stem"]["norm"]
    maps = np.concatenate([first_maps(variables, images) for images in batches])
    np.testing.assert_allclose(found["mean"], maps.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found["var"], maps.var((0, 1, 2), ddof=1), rtol=1e-4)


class OneLayer(nn.Module):
    """A normalisation alone."""

    unbiased: bool = True

    @nn.compact
    def __call__(self, x, train):
        return BatchNorm(use_running_average=not train, unbiased=self.unbiased)(x)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("num_batches", [1, 2, 5])
def test_one_layer_has_the_closed_form_far_from_zero(unbiased, num_batches):
    """Where E[x^2] - E[x]^2 loses all digits in float32."""
    rng = np.random.default_rng(1)
    x = (1000 + 0.1 * rng.normal(size=(20, 3, 3, 4))).astype(np.float32)
    model = OneLayer(unbiased)
    variables = model.init(jax.random.key(0), x, train=False)
    found = precise_batch_stats(model, variables, np.split(x[:20], num_batches))
    found = found["BatchNorm_0"]
    exact = x.astype(np.float64)
    np.testing.assert_allclose(found["mean"], exact.mean((0, 1, 2)), rtol=1e-6)
    variance = exact.var((0, 1, 2), ddof=int(unbiased))
    np.testing.assert_allclose(found["var"], variance, rtol=1e-3)


def test_a_single_value_has_variance_zero_and_not_nan():
    model, x = OneLayer(), np.ones((1, 1, 1, 2), np.float32)
    variables = model.init(jax.random.key(0), x, train=False)
    found = precise_batch_stats(model, variables, [x])["BatchNorm_0"]
    np.testing.assert_array_equal(found["mean"], [1, 1])
    np.testing.assert_array_equal(found["var"], [0, 0])


def test_a_scanned_net_has_the_statistics_of_the_unrolled_one():
    batches = batches_of(2)
    options = {"num_classes": 3, "remat": True}
    unrolled = create_model("cifar_resnet20", scan=False, **options)
    scanned = create_model("cifar_resnet20", scan=True, **options)
    variables = unrolled.init(jax.random.key(0), batches[0], train=False)
    stacked = {name: stack_blocks(tree) for name, tree in variables.items()}
    expected = precise_batch_stats(unrolled, variables, batches)
    found = unstack_blocks(precise_batch_stats(scanned, stacked, batches))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        dict(found),
        dict(expected),
    )


def test_frozen_normalisations_keep_their_statistics(net):
    model, variables = net
    frozen = model.clone(batch_norm_frozen=("stem",))
    found = precise_batch_stats(frozen, variables, batches_of(2))
    jax.tree.map(
        np.testing.assert_array_equal, found["stem"], variables["batch_stats"]["stem"]
    )
    assert not np.allclose(found["stage1"]["block1"]["norm1"]["var"], 1)


def test_every_batch_counts_the_same_and_what_was_there_does_not(net):
    model, variables = net
    batches = batches_of(3)
    stats = precise_batch_stats(model, variables, batches)
    changed = jax.tree.map(lambda leaf: leaf * np.nan, variables["batch_stats"])
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

    grouped = precise_batch_stats(
        model.clone(norm=functools.partial(BatchNorm, groups=2)), variables, batches
    )
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
