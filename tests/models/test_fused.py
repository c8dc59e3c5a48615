"""The fused normalisation, addition and ReLU against the plain one beside it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

from resnet_jax.models import (
    BasicBlock,
    BatchNorm,
    BottleneckBlock,
    CifarStem,
    DeepStem,
    ImageNetStem,
    OverlappingStage,
    PreActBasicBlock,
    ResNet,
    SqueezeExcite,
    precise_batch_stats,
    shortcuts,
)
from resnet_jax.models.fused import Form, fused_batch_norm, plain_batch_norm
from resnet_jax.parallel import batch_sharding, data_mesh
from tests.models.reference import (
    KEY,
    assert_trees_close,
    assert_trees_equal,
    double_precision,
    random_variables,
)

CHANNELS = 5


def drawn(groups, with_shortcut, dtype=np.float64):
    """The arguments, and gradients of y, mean and variance."""
    rng = np.random.default_rng(groups)
    shape, numbers = (groups, 4, 3, 2, CHANNELS), (groups, 1, 1, 1, CHANNELS)
    x = 2 + 3 * rng.normal(size=shape)
    shortcut = rng.normal(size=shape) if with_shortcut else None
    scale, bias = rng.uniform(0.5, 1.5, CHANNELS), rng.normal(size=CHANNELS)
    cotangents = [rng.normal(size=size) for size in (shape, numbers, numbers)]
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype), ((x, shortcut, scale, bias), cotangents)
    )


def pulled_back(function, arguments, cotangents, form):
    """The function's results and the gradient of each argument."""

    def run(arguments, cotangents):
        results, pull = jax.vjp(lambda *values: function(*values, form), *arguments)
        return results, pull(tuple(cotangents))

    return jax.tree.map(np.asarray, jax.jit(run)(arguments, cotangents))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_in_float64_both_forms_are_one(groups, with_shortcut, relu):
    """Values, moments, and every gradient, those through the moments included."""
    with double_precision():
        form = Form(relu=relu, dtype=jnp.float64)
        problem = drawn(groups, with_shortcut)
        ours = pulled_back(fused_batch_norm, *problem, form)
        expected = pulled_back(plain_batch_norm, *problem, form)
        (y, _, _), _ = expected
        assert not relu or 0.1 < (y == 0).mean() < 0.9
        assert_trees_close(ours, expected, 1e-12)


@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize(
    ("dtype", "error"), [(jnp.float32, 3e-6), (jnp.bfloat16, 2e-2)]
)
def test_in_narrower_types_they_agree_to_rounding(dtype, error, with_shortcut):
    """Parameters and moments are float32; maps and their gradients have the dtype."""
    (x, shortcut, scale, bias), (gradient, *others) = drawn(2, with_shortcut, "float32")
    maps = jax.tree.map(lambda leaf: leaf.astype(dtype), (x, shortcut, gradient))
    problem = (*maps[:2], scale, bias), (maps[2], *others)
    form = Form(relu=True, dtype=dtype)
    ours = pulled_back(fused_batch_norm, *problem, form)
    expected = pulled_back(plain_batch_norm, *problem, form)
    assert_trees_close(ours[0], expected[0], error)
    for leaf, like in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        assert leaf.dtype == like.dtype
        # A value that one form rounds to zero passes its gradient on in the other.
        wrong = np.abs(np.float32(leaf) - np.float32(like))
        bound = error * np.abs(np.float32(like)).max()
        assert np.mean(wrong > bound) <= (0 if dtype == jnp.float32 else 0.01)


@pytest.mark.parametrize("with_shortcut", [False, True])
def test_gradients_of_both_orders_are_finite_differences(with_shortcut):
    with double_precision():
        arguments, _ = drawn(1, with_shortcut)
        form = Form(relu=True, dtype=jnp.float64)
        small = jax.tree.map(lambda leaf: leaf[..., :2, :2], arguments[:2])
        numbers = [leaf[:2] for leaf in arguments[2:]]
        check_grads(
            lambda *values: fused_batch_norm(*values, form),
            (*small, *numbers),
            order=2,
            modes=["rev"],
            eps=1e-5,
        )


@pytest.mark.parametrize(("with_shortcut", "maps"), [(False, 1), (True, 2)])
def test_the_gradient_keeps_the_input_and_at_most_the_output(with_shortcut, maps):
    """Of the arrays as large as the map: x, and behind an addition y."""
    arguments, _ = drawn(1, with_shortcut, "float32")
    form = Form(relu=True)

    def kept(function):
        _, pull = jax.vjp(lambda *values: function(*values, form), *arguments)
        return [
            leaf for leaf in jax.tree.leaves(pull) if leaf.size >= arguments[0].size
        ]

    x, shortcut, *_ = arguments
    ours = kept(fused_batch_norm)
    assert len(ours) == maps
    assert sum(np.array_equal(leaf, x) for leaf in ours) == 1
    if shortcut is not None:
        y, _, _ = fused_batch_norm(*arguments, form)
        assert sum(np.array_equal(leaf, y) for leaf in ours) == 1
    assert len(kept(plain_batch_norm)) > maps


# Nets


def cifar(block, shortcut, **options):
    fields = {"stem": CifarStem, "width": 4, "num_classes": 3} | options
    return ResNet((1, 1), block, shortcut, **fields)


def plain_net(net):
    return net.clone(norm=functools.partial(net.norm, fused=False))


NETS = {
    "A": cifar(
        BasicBlock, shortcuts.ZeroPad(), norm=functools.partial(BatchNorm, groups=2)
    ),
    "B": cifar(BottleneckBlock, shortcuts.Projection(), stem=ImageNetStem),
    "pooled, scanned": cifar(
        BasicBlock, shortcuts.Projection(pooled=True), stem=DeepStem, scan=True
    ).clone(stage_sizes=(3,), remat=True),
    "plain": cifar(BasicBlock, shortcuts.NoShortcut()),
    "preactivated": cifar(PreActBasicBlock, shortcuts.ZeroPad()),
    "gated": cifar(BasicBlock, shortcuts.Gated(exclusive=True)),
    "squeezed": cifar(
        functools.partial(BasicBlock, squeeze_excite=SqueezeExcite),
        shortcuts.Projection(),
    ),
    "another activation": cifar(
        functools.partial(BasicBlock, activation=nn.silu), shortcuts.ZeroPad()
    ),
    "dropped": cifar(
        BasicBlock,
        shortcuts.ZeroPad(),
        stochastic_depth_rate=0.5,
        dropout_rate=0.5,
    ),
    "overlapping": cifar(
        BasicBlock,
        shortcuts.ZeroPad(),
        stage=functools.partial(OverlappingStage, every=1, span=2),
    ),
    "frozen stem": cifar(BasicBlock, shortcuts.ZeroPad(), batch_norm_frozen=("stem",)),
    "all frozen": cifar(BasicBlock, shortcuts.ZeroPad(), batch_norm_frozen=True),
}


def problem_of(model, images_like=(4, 8, 8, 3), dtype=np.float64):
    rng = np.random.default_rng(0)
    images = rng.normal(0.3, 1, images_like).astype(dtype)
    variables = random_variables(model, np.float32(images), dtype=dtype)
    return variables, images, rng.normal(size=(len(images), 3)).astype(dtype)


def training_pass(model, variables, images, cotangent):
    """Logits, gradients and new statistics."""

    def loss(params, images):
        logits, updated = model.apply(
            variables | {"params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": KEY},
        )
        return jnp.vdot(logits, cotangent), (logits, updated["batch_stats"])

    gradients, results = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        variables["params"], images
    )
    return {"gradients": gradients, "results": results}


@pytest.mark.parametrize("name", NETS)
def test_nets_are_the_same(name):
    fused = NETS[name].clone(dtype=jnp.float64)
    plain = plain_net(fused)
    problem = problem_of(NETS[name])
    with double_precision():
        run = jax.jit(training_pass, static_argnums=0)
        expected = jax.tree.map(np.asarray, run(plain, *problem))
        ours = jax.tree.map(np.asarray, run(fused, *problem))
    assert_trees_close(ours, expected, 1e-10)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_every_normalisation_adds_and_rectifies_if_asked(average, fused):
    rng = np.random.default_rng(0)
    x, shortcut = rng.normal(size=(2, 6, 4, 3)).astype(np.float32)
    norm = BatchNorm(use_running_average=average, fused=fused)
    variables = random_variables(norm, x)

    def output(*arguments, **options):
        y, _ = norm.apply(variables, x, *arguments, **options, mutable=["batch_stats"])
        return np.asarray(y)

    expected = np.maximum(output() + shortcut, 0)
    assert (expected == 0).any()
    np.testing.assert_allclose(output(shortcut, relu=True), expected, atol=1e-6)


def test_precise_statistics_are_the_same():
    """They are taken from what normalisations are called with."""
    variables, images, _ = problem_of(NETS["A"], dtype=np.float32)
    plain, fused = (
        precise_batch_stats(net, variables, [images, 2 * images])
        for net in (plain_net(NETS["A"]), NETS["A"])
    )
    assert_trees_close(fused, plain, 1e-5)


def test_parameters_are_the_same_bit_for_bit():
    net, images = NETS["A"], jnp.zeros((2, 8, 8, 3))
    plain = jax.jit(plain_net(net).init)(KEY, images)
    init = functools.partial(net.init, train=True)
    assert_trees_equal(jax.jit(init)(KEY, images), plain)


def fused_calls(model, train):
    """How often the program calls a function with a gradient of its own."""
    variables, images, _ = problem_of(model, dtype=np.float32)
    apply = functools.partial(
        model.apply, train=train, mutable=["batch_stats"], rngs={"dropout": KEY}
    )
    text = str(jax.make_jaxpr(apply)(variables, images))
    return text.count("custom_vjp_call")


@pytest.mark.parametrize(
    ("name", "norms"),
    [("A", 5), ("B", 10), ("preactivated", 5), ("frozen stem", 4), ("all frozen", 0)],
)
def test_every_normalisation_in_training_is_fused_and_none_in_evaluation(name, norms):
    """1 of the stem and 2 of each of 2 blocks; of bottlenecks 3, and 2 projections.

    An ImageNet stem's pooling is one more.

    A pre-activation net has none in its first block's front, and one at its end.
    """
    model = NETS[name]
    assert fused_calls(model, train=True) == norms
    assert fused_calls(model, train=False) == 0
    assert fused_calls(plain_net(model), train=True) == 0


def maps_kept(block):
    """How many maps of its size a block's gradient keeps."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 8)), jnp.float32)
    variables = random_variables(block, x)

    def run(params, x):
        inputs = variables | {"params": params}
        return block.apply(inputs, x, mutable=["batch_stats"])[0]

    _, pull = jax.vjp(run, variables["params"], x)
    return sum(np.size(leaf) == x.size for leaf in jax.tree.leaves(pull))


def test_a_block_keeps_two_maps_a_convolution_and_its_output():
    """Each convolution's input and output; the next block's input is the output."""

    def block(fused):
        norm = functools.partial(BatchNorm, use_running_average=False, fused=fused)
        return BasicBlock(8, 1, norm, shortcuts.ZeroPad())

    assert maps_kept(block(fused=True)) == 5
    assert maps_kept(block(fused=False)) > 5


def test_eight_devices_are_one():
    """With the batch cut over them, statistics are those of the whole batch."""
    model = NETS["A"]
    problem = problem_of(model, (16, 8, 8, 3), np.float32)
    run = jax.jit(training_pass, static_argnums=0)
    expected = run(model, *problem)
    variables, *batch = problem
    cut = jax.device_put(batch, batch_sharding(data_mesh(8)))
    ours = run(model, variables, *cut)
    assert len(ours["results"][0].sharding.device_set) == 8
    assert_trees_close(ours, expected, 2e-5)
