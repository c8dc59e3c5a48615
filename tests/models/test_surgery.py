"""A deeper net that computes the same: section 1's solution by construction."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from resnet_jax.errors import UserError
from resnet_jax.models import (
    BasicBlock,
    BatchNorm,
    BottleneckBlock,
    CifarStem,
    DeepStem,
    NoNorm,
    OverlappingStage,
    PreActBasicBlock,
    ResNet,
    SqueezeExcite,
    create_model,
    deepen,
    shortcuts,
    unstack_blocks,
)
from tests.models.reference import (
    KEY,
    assert_trees_equal,
    batch_norm,
    convolution,
    random_variables,
    relu,
)

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 1])
BARE = shortcuts.Projection(normalized=False)

tiny = functools.partial(ResNet, stem=CifarStem, width=4, num_classes=3)
plain = functools.partial(tiny, shortcut=shortcuts.NoShortcut())


as_users_compile = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
    },
)
"""With all optimisations: two programs, which the compiler may round differently."""


class Case(NamedTuple):
    """A net, the stages of the deeper one, and the layer that silences a block."""

    model: ResNet
    sizes: tuple[int, ...]
    silent: str


NETS = {
    "basic": Case(tiny((1, 1), BasicBlock, shortcuts.ZeroPad()), (2, 3), "norm2"),
    "three convolutions, regularised": Case(
        tiny(
            (1, 1),
            functools.partial(BasicBlock, num_convs=3, zero_init_last=True),
            dropout_rate=0.2,
            stochastic_depth_rate=0.3,
        ),
        (1, 2),
        "norm3",
    ),
    "gated bottlenecks": Case(
        tiny(
            (1,),
            functools.partial(BottleneckBlock, squeeze_excite=SqueezeExcite),
            stem=functools.partial(DeepStem, inner=(4, 4)),
        ),
        (3,),
        "norm3",
    ),
    "preactivated": Case(tiny((1, 2), PreActBasicBlock, BARE), (3, 2), "conv2"),
    "scanned": Case(
        tiny((2, 1), BasicBlock, shortcuts.ZeroPad(), scan=True), (3, 2), "norm2"
    ),
}


def train_step(model):
    """Plain descent, compiled: new variables, the gradient, and the logits."""

    def step(variables):
        def loss(params):
            logits, updated = model.apply(
                variables | {"params": params},
                IMAGES,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
            return losses.mean(), (logits, updated)

        params = variables["params"]
        gradient, (logits, updated) = jax.grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
        return {"params": params, **updated}, gradient, logits

    return jax.jit(step)


def logits_of(model, variables, compiler=lambda function: function):
    """In evaluation; and in training, with the new statistics."""
    # What is left out at random differs between nets of different depths.
    sure = model.clone(dropout_rate=0.0, stochastic_depth_rate=0.0)

    def run(variables):
        logits, updated = sure.apply(
            variables, IMAGES, train=True, mutable=["batch_stats"]
        )
        return sure.apply(variables, IMAGES), logits, updated["batch_stats"]

    return compiler(run)(variables)


PLAIN = {
    "plain": Case(plain((1, 2)), (3, 2), ""),
    "plain, three convolutions, another epsilon": Case(
        plain(
            (1, 1),
            functools.partial(BasicBlock, num_convs=3),
            norm=functools.partial(BatchNorm, epsilon=1e-3),
            dropout_rate=0.2,
        ),
        (1, 2),
        "",
    ),
    "plain, scanned": Case(plain((2, 1), scan=True), (4, 3), ""),
    "plain without normalisation": Case(plain((1, 1), norm=NoNorm), (2, 3), ""),
}


TRAINED = ("basic", "gated bottlenecks")


@functools.cache
def trained(net):
    """Weights at random, some of them after a few steps of descent."""
    model = NETS[net].model
    start = variables = random_variables(model, IMAGES)
    if net in TRAINED:
        step = train_step(model)
        for _ in range(3):
            variables, _, _ = step(variables)
        for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(variables)):
            assert np.any(before != after)
    return variables


@functools.cache
def deepened(net):
    model, sizes, _ = NETS[net]
    return deepen(trained(net), model, sizes, KEY)


def part_of(tree, like):
    """What of the deeper net's tree the shallower one has too."""
    if not isinstance(like, dict):
        return tree
    return {name: part_of(tree[name], child) for name, child in like.items()}


def new_blocks(tree, net):
    """Those that the shallower net has not."""
    model, sizes, _ = NETS[net]
    tree = unstack_blocks(tree)
    return [
        tree[f"stage{stage}"][f"block{number}"]
        for stage, (old, new) in enumerate(zip(model.stage_sizes, sizes), start=1)
        for number in range(old + 1, new + 1)
    ]


@pytest.mark.parametrize("net", NETS)
def test_the_deeper_net_computes_the_same_bit_for_bit(net):
    model, sizes, _ = NETS[net]
    deeper, variables = deepened(net)
    assert deeper == model.clone(stage_sizes=sizes)
    # One operation at a time: nothing is fused, and so nothing rounded otherwise.
    with jax.disable_jit():
        evaluated, in_training, stats = logits_of(model, trained(net))
        ours = logits_of(deeper, variables)
    np.testing.assert_array_equal(ours[0], evaluated)
    np.testing.assert_array_equal(ours[1], in_training)
    assert np.abs(evaluated - in_training).max() > 1e-3
    assert np.ptp(evaluated, axis=0).max() > 1e-3
    stats = unstack_blocks(stats)
    assert_trees_equal(part_of(unstack_blocks(ours[2]), stats), stats)


@pytest.mark.parametrize("net", TRAINED)
def test_compiled_it_differs_by_rounding_at_most(net):
    deeper, variables = deepened(net)
    expected = logits_of(NETS[net].model, trained(net), as_users_compile)[:2]
    ours = logits_of(deeper, variables, as_users_compile)[:2]
    for a, b in zip(ours, expected):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net", NETS)
def test_the_trained_weights_are_kept_and_the_new_ones_are_fresh(net):
    model, sizes, silent = NETS[net]
    deeper, variables = deepened(net)
    old = unstack_blocks(trained(net))
    assert_trees_equal(part_of(unstack_blocks(variables), old), old)
    shapes = jax.eval_shape(deeper.init, KEY, IMAGES)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)

    blocks = new_blocks(variables["params"], net)
    assert len(blocks) == sum(sizes) - sum(model.stage_sizes)
    for block in blocks:
        assert not any(np.any(leaf) for leaf in block[silent].values())
        for path, leaf in traverse_util.flatten_dict(block).items():
            assert np.all(leaf != 0) == (path[0] != silent and path[-1] != "bias")
    kernels = {np.asarray(block["conv1"]["kernel"]).tobytes() for block in blocks}
    assert len(kernels) == len(blocks)
    for stats in new_blocks(variables["batch_stats"], net):
        for moments in stats.values():
            np.testing.assert_array_equal(moments["mean"], 0)
            np.testing.assert_array_equal(moments["var"], 1)


@pytest.mark.parametrize("net", ["basic", "preactivated"])
def test_the_new_blocks_learn(net):
    """What silences a block has a gradient at once, and all of it a step later."""
    silent = NETS[net].silent
    deeper, variables = deepened(net)
    step = train_step(deeper)
    after, gradient, _ = step(variables)
    for block in new_blocks(gradient, net):
        for leaf in block[silent].values():
            assert np.any(leaf)
        assert not np.any(block["conv1"]["kernel"])
    _, gradient, _ = step(after)
    for block in new_blocks(gradient, net):
        for name, leaves in block.items():
            for leaf in leaves.values():
                assert np.any(leaf), name


# Plain nets: in evaluation only


def evaluate(model, variables):
    return np.asarray(model.apply(variables, IMAGES))


@functools.cache
def deepened_plain(net):
    model, sizes, _ = PLAIN[net]
    variables = random_variables(model, IMAGES)
    return model, variables, *deepen(variables, model, sizes, KEY)


@pytest.mark.parametrize("net", PLAIN)
def test_a_deeper_plain_net_computes_the_same_bit_for_bit_in_evaluation(net):
    model, variables, deeper, deeper_variables = deepened_plain(net)
    assert deeper == model.clone(stage_sizes=PLAIN[net].sizes)
    shapes = jax.eval_shape(deeper.init, KEY, IMAGES)
    assert jax.tree.map(np.shape, deeper_variables) == jax.tree.map(np.shape, shapes)
    with jax.disable_jit():
        expected = evaluate(model, variables)
        ours = evaluate(deeper, deeper_variables)
    assert np.ptp(expected, axis=0).max() > 1e-3
    np.testing.assert_array_equal(ours, expected)


def test_compiled_a_deeper_plain_net_differs_by_rounding_at_most():
    model, variables, deeper, deeper_variables = deepened_plain("plain")
    expected = as_users_compile(model.apply)(variables, IMAGES)
    ours = as_users_compile(deeper.apply)(deeper_variables, IMAGES)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_in_training_the_batchs_statistics_change_a_deeper_plain_net():
    model, variables, deeper, deeper_variables = deepened_plain("plain")
    _, expected, _ = logits_of(model, variables, jax.jit)
    _, ours, _ = logits_of(deeper, deeper_variables, jax.jit)
    assert np.abs(ours - expected).max() > 1e-2


@pytest.mark.parametrize(
    "model",
    [
        plain((1, 1), norm=NoNorm),
        plain((1, 1), batch_norm_frozen=True),
        tiny((1, 1), shortcut=shortcuts.ZeroPad(), norm=NoNorm),
    ],
    ids=["plain without normalisation", "plain, frozen", "residual without"],
)
def test_where_no_statistics_are_taken_it_is_the_same_in_training_too(model):
    variables = random_variables(model, IMAGES)
    deeper, deeper_variables = deepen(variables, model, (2, 2), KEY)
    with jax.disable_jit():
        expected, ours = (
            net.apply(values, IMAGES, train=True, mutable=["batch_stats"])[0]
            for net, values in ((model, variables), (deeper, deeper_variables))
        )
    assert np.ptp(expected, axis=0).max() > 1e-3
    np.testing.assert_array_equal(ours, expected)


def test_the_new_layers_of_a_plain_net_are_identities_by_hand():
    _, _, _, variables = deepened_plain("plain")
    params = variables["params"]["stage1"]["block3"]
    stats = variables["batch_stats"]["stage1"]["block3"]
    maps = np.random.default_rng(2).uniform(0, 3, (2, 5, 6, 4))
    y = maps
    for layer in ("1", "2"):
        kernel = np.asarray(params[f"conv{layer}"]["kernel"], np.float64)
        y = convolution(y, kernel)
        y = relu(batch_norm(y, params[f"norm{layer}"], stats[f"norm{layer}"]))
    np.testing.assert_allclose(y, maps, rtol=1e-6)


def test_the_new_layers_of_a_plain_net_learn():
    _, _, deeper, variables = deepened_plain("plain")
    _, gradient, _ = train_step(deeper)(variables)
    for path, leaf in traverse_util.flatten_dict(gradient["stage1"]["block3"]).items():
        assert np.any(leaf), path


def test_the_model_and_its_variables_stay_as_they_are():
    model, variables = NETS["basic"].model, trained("basic")
    before = jax.tree.map(np.array, variables)
    same, copy = deepen(variables, model, (1, 1), KEY)
    assert same == model
    assert_trees_equal(copy, before)
    assert_trees_equal(variables, before)


def test_the_key_determines_the_new_weights():
    model = NETS["basic"].model
    first, again, other = (
        deepen(trained("basic"), model, (2, 1), jax.random.fold_in(KEY, seed))[1]
        for seed in (0, 0, 1)
    )
    assert_trees_equal(first, again)
    path = ("params", "stage1", "block2", "conv1", "kernel")
    kernels = [functools.reduce(dict.__getitem__, path, v) for v in (first, other)]
    assert np.all(kernels[0] != kernels[1])


@pytest.mark.parametrize(
    ("model", "sizes", "sentence"),
    [
        (
            tiny((1, 1), shortcut=shortcuts.BY_NAME["C"]),
            (2, 2),
            "option C projects in every block",
        ),
        (
            tiny((1, 1), shortcut=shortcuts.Scaled()),
            (2, 2),
            "others scale, gate or drop",
        ),
        (tiny((1, 1), shortcut=shortcuts.Gated(True)), (2, 2), "others scale, gate"),
        (tiny((1, 1), shortcut=shortcuts.Dropped()), (2, 2), "others scale, gate"),
        (plain((1, 1), BottleneckBlock), (2, 2), "plain nets of basic blocks"),
        (plain((1, 1), PreActBasicBlock), (2, 2), "plain nets of basic blocks"),
        (
            plain((1, 1), functools.partial(BasicBlock, squeeze_excite=SqueezeExcite)),
            (2, 2),
            "plain nets of basic blocks",
        ),
        (
            plain((1, 1), functools.partial(BasicBlock, activation=jax.nn.gelu)),
            (2, 2),
            "plain nets of basic blocks",
        ),
        (tiny((2, 2)), (3, 1), r"from stages of \(2, 2\) blocks to \(3, 1\)"),
        (tiny((2, 2)), (2, 2, 1), r"as many stages, none shorter"),
        (tiny((2, 2)), (2,), r"as many stages"),
        (tiny((1, 1), stage=OverlappingStage), (2, 2), "a ResNet of ordinary stages"),
        (
            tiny((1, 1), stage=functools.partial(OverlappingStage, every=2)),
            (2, 2),
            "a ResNet of ordinary stages",
        ),
        (create_model("vgg16"), (2, 2), "a ResNet of ordinary stages"),
    ],
    ids=[
        "C",
        "scaled",
        "gated",
        "dropped",
        "plain bottlenecks",
        "plain preactivation",
        "plain squeeze-and-excitation",
        "plain without ReLU",
        "fewer",
        "more stages",
        "fewer stages",
        "chain",
        "partial",
        "vgg",
    ],
)
def test_nets_that_have_no_identities_are_refused(model, sizes, sentence):
    with pytest.raises(UserError, match=sentence):
        deepen({"params": {}, "batch_stats": {}}, model, sizes, KEY)
