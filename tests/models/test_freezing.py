"""Frozen parts: their normalisation, and their parameters."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from resnet_jax.errors import UserError
from resnet_jax.models import (
    CifarStem,
    PreActBasicBlock,
    ResNet,
    trainable_mask,
)
from tests.models.reference import (
    assert_trees_equal,
    random_variables,
)

MODEL = ResNet((2, 1, 1), stem=CifarStem, width=4, num_classes=3)
PREACTIVATED = MODEL.clone(stage_sizes=(1, 1), block=PreActBasicBlock)
IMAGES = np.random.default_rng(1).normal(1, 2, (4, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODEL, IMAGES)


@functools.cache
def trained(model, frozen):
    """Maps and new statistics of a pass in training."""
    variables = random_variables(model, IMAGES)
    call = functools.partial(
        model.clone(batch_norm_frozen=frozen).apply,
        train=True,
        method="features",
        mutable=["batch_stats"],
    )
    maps, updated = jax.jit(call)(variables, IMAGES)
    return maps, {**variables, **updated}["batch_stats"]


@functools.cache
def evaluated(model):
    call = functools.partial(model.apply, method="features")
    return jax.jit(call)(random_variables(model, IMAGES), IMAGES)


@pytest.mark.parametrize("model", [MODEL, PREACTIVATED], ids=["net", "preactivated"])
def test_a_frozen_net_trains_by_its_running_statistics_and_keeps_them(model):
    maps, stats = trained(model, frozen=True)
    assert_trees_equal(stats, random_variables(model, IMAGES)["batch_stats"])
    for ours, expected in zip(maps, evaluated(model), strict=True):
        np.testing.assert_allclose(ours.array, expected.array, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "frozen"),
    [
        (MODEL, ("stem", "stage1")),
        (MODEL, ("stage2",)),
        (MODEL, ()),
        (PREACTIVATED, ("stage1", "norm")),
    ],
    ids=["two parts", "one part", "none", "preactivated"],
)
def test_parts_freeze_by_themselves(model, frozen):
    before = random_variables(model, IMAGES)["batch_stats"]
    _, after = trained(model, frozen)
    changed = {
        part: [
            bool((np.asarray(a) != b).any())
            for a, b in zip(
                jax.tree.leaves(after[part]), jax.tree.leaves(before[part]), strict=True
            )
        ]
        for part in before
    }
    assert {part for part, flags in changed.items() if not any(flags)} == set(frozen)
    assert {part for part, flags in changed.items() if all(flags)} == (
        set(before) - set(frozen)
    )


def test_frozen_parts_normalise_by_running_statistics_and_the_others_do_not():
    maps, _ = trained(MODEL, frozen=("stem", "stage1"))
    close = [
        np.allclose(ours.array, expected.array, rtol=1e-4, atol=1e-4)
        for ours, expected in zip(maps, evaluated(MODEL), strict=True)
    ]
    assert close == [True, True, False, False]


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


@pytest.mark.parametrize(
    "frozen",
    [
        (),
        ("stem",),
        ("stem", "stage1", "head"),
        ("stage1/block1", "stage2/block1/conv2", "head/bias"),
    ],
    ids=str,
)
def test_the_mask_is_false_in_the_frozen_parts(variables, frozen):
    params = variables["params"]
    mask = trainable_mask(params, frozen)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert flat(mask) == {
        name: not any(name == part or name.startswith(f"{part}/") for part in frozen)
        for name in flat(params)
    }


def test_the_mask_leaves_the_parameters_alone(variables):
    before = jax.tree.map(np.copy, variables["params"])
    trainable_mask(variables["params"], ("stem", "head/bias"))
    assert_trees_equal(variables["params"], before)


@pytest.mark.parametrize(
    ("part", "hint"),
    [
        ("stage4", "did you mean stage3?"),
        ("stage1/block3", "did you mean block2?"),
        ("Stem", "did you mean stem?"),
        ("zzz", "valid are head, stage1, stage2, stage3, stem"),
        ("", "valid are"),
        ("stem/", "valid are"),
        ("head/kernel/0", "kernel is an array, without parts"),
    ],
)
def test_parts_that_are_not_there_are_refused(variables, part, hint):
    with pytest.raises(UserError) as error:
        trainable_mask(variables["params"], [part])
    sentence = str(error.value)
    assert sentence.startswith(f"there is no part {part!r} to freeze")
    if hint.startswith("valid are "):
        parts = hint.removeprefix("valid are ").split(", ")
        assert sorted(sentence.partition("valid are ")[2].split(", ")) == parts
    else:
        assert hint in sentence


def test_frozen_parameters_stay_through_momentum_and_weight_decay(variables):
    frozen = ("stem", "stage1/block1", "head/bias")
    model = MODEL.clone(batch_norm_frozen=("stem",))
    params = variables["params"]
    mask = trainable_mask(params, frozen)
    sgd = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    optimizer = optax.multi_transform({True: sgd, False: optax.set_to_zero()}, mask)
    labels = np.array([0, 1, 2, 0])

    @jax.jit
    def step(params, stats, state):
        def loss(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": stats},
                IMAGES,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        gradients, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), stats, state

    stats, state, new = variables["batch_stats"], optimizer.init(params), params
    for _ in range(3):
        new, stats, state = step(new, stats, state)
    for name, is_trainable in flat(mask).items():
        before, after = np.asarray(flat(params)[name]), np.asarray(flat(new)[name])
        if is_trainable:
            assert (before != after).all(), name
        else:
            np.testing.assert_array_equal(after, before, err_msg=name)
    # The statistics of the part that batch_norm_frozen names stayed with it.
    assert_trees_equal(stats["stem"], variables["batch_stats"]["stem"])
    assert np.abs(stats["stage1"]["block1"]["norm1"]["mean"]).max() > 0
