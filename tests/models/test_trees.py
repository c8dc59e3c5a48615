"""The two trees of one net, converted in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.models import (
    CifarStem,
    OverlappingStage,
    ResNet,
    create_model,
    stack_blocks,
    unstack_blocks,
)
from resnet_jax.models.trees import is_stacked, parts_in_order
from tests.models.reference import KEY, assert_trees_equal, random_variables

MODEL = ResNet((12, 1, 2), stem=CifarStem, width=2, num_classes=3)


@pytest.fixture(scope="module")
def variables():
    """Of the unrolled net: params and batch_stats, each leaf different."""
    return random_variables(MODEL, np.zeros((1, 8, 8, 3), np.float32))


def shapes(model):
    images = jnp.zeros((1, 8, 8, 3))
    return jax.tree.map(np.shape, jax.eval_shape(model.init, KEY, images))


def test_the_trees_are_those_that_the_nets_create(variables):
    assert jax.tree.map(np.shape, stack_blocks(variables)) == shapes(
        MODEL.clone(scan=True)
    )
    assert jax.tree.map(np.shape, unstack_blocks(stack_blocks(variables))) == shapes(
        MODEL
    )


def test_blocks_lie_in_the_order_of_their_numbers(variables):
    """block10 behind block9, not behind block1."""
    stacked = stack_blocks(variables)
    for collection, tree in stacked.items():
        assert set(tree["stage1"]) == {"block1", "blocks"}
        for number in range(2, 13):
            block = jax.tree.map(lambda a, i=number - 2: a[i], tree["stage1"]["blocks"])
            assert_trees_equal(block, variables[collection]["stage1"][f"block{number}"])
        first = variables[collection]["stage1"]["block1"]
        assert_trees_equal(tree["stage1"]["block1"], first)
        # A stage of one block has nothing to stack; other parts are left alone.
        assert_trees_equal(tree["stage2"], variables[collection]["stage2"])
        assert_trees_equal(tree["stem"], variables[collection]["stem"])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.uint8])
def test_back_and_forth_loses_no_bit(variables, dtype):
    def odd(leaf):
        """Bits of any kind: of a NaN with a payload too."""
        count = leaf.size * np.dtype(dtype).itemsize
        bits = np.random.default_rng(leaf.size).integers(0, 256, count, np.uint8)
        return jnp.asarray(bits.view(dtype).reshape(leaf.shape))

    tree = jax.tree.map(odd, variables)
    stacked = stack_blocks(tree)
    assert_trees_equal(unstack_blocks(stacked), tree)
    assert_trees_equal(stack_blocks(unstack_blocks(stacked)), stacked)


def test_converting_twice_changes_nothing(variables):
    stacked = stack_blocks(variables)
    assert_trees_equal(stack_blocks(stacked), stacked)
    assert_trees_equal(unstack_blocks(variables), variables)
    assert is_stacked(stacked)
    assert not is_stacked(unstack_blocks(stacked))


def test_gradients_convert_as_their_params_do(variables):
    """A gradient is a tree of its own, without the collections' names."""
    params = variables["params"]

    @jax.jit
    def gradient(params):
        return jax.grad(
            lambda p: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(p))
        )(params)

    stacked = gradient(stack_blocks(params))
    assert_trees_equal(unstack_blocks(stacked), unstack_blocks(stacked))
    assert jax.tree.structure(unstack_blocks(stacked)) == jax.tree.structure(params)
    jax.tree.map(
        lambda ours, leaf: np.testing.assert_allclose(ours, np.cos(leaf), atol=1e-6),
        unstack_blocks(stacked),
        params,
    )


def test_what_an_optimizer_keeps_converts_too(variables):
    """Trees within a dictionary, at any depth."""
    state = {"momentum": {"mu": variables["params"]}, "count": np.int32(3)}
    stacked = stack_blocks(state)
    assert set(stacked["momentum"]["mu"]["stage1"]) == {"block1", "blocks"}
    assert stacked["count"] == 3
    assert_trees_equal(unstack_blocks(stacked), state)


def test_nets_without_numbered_blocks_are_left_alone():
    model = ResNet((2,), stage=OverlappingStage, stem=CifarStem, width=2)
    variables = random_variables(model, np.zeros((1, 4, 4, 3), np.float32))
    assert_trees_equal(stack_blocks(variables), variables)
    assert not is_stacked(variables)


def test_the_arguments_are_not_changed(variables):
    names = set(variables["params"]["stage1"])
    stacked = stack_blocks(variables)
    unstack_blocks(stacked)
    assert set(variables["params"]["stage1"]) == names
    assert set(stacked["params"]["stage1"]) == {"block1", "blocks"}


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "cifar_preact_resnet20",
        "cifar_highway19",
        "vgg16_bn",
        "mnist_plain20",
        "mnist_highway20",
    ],
)
def test_parts_come_in_the_order_in_which_an_image_passes_them(name):
    model, passed = create_model(name), []

    def note(call, args, kwargs, context):
        if len(path := context.module.path) == 1 and path[0] not in passed:
            passed.append(path[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        variables = jax.eval_shape(model.init, KEY, jnp.zeros((1, 32, 32, 3)))
    assert parts_in_order(variables["params"]) == [
        part for part in passed if part in variables["params"]
    ]
    assert parts_in_order(variables["params"])[-1] == "head"
