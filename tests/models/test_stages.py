"""Stages: what each block is given, overlapping shortcuts, loops and remat."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.models import (
    BasicBlock,
    BatchNorm,
    CifarStem,
    Conv,
    OverlappingStage,
    PreActBottleneckBlock,
    ResNet,
    SqueezeExcite,
    Stage,
    StochasticDepth,
    create_model,
    shortcuts,
    stack_blocks,
)
from tests.models.reference import (
    KEY,
    Layers,
    apply,
    assert_trees_close,
    double_precision,
    random_variables,
    relu,
)

EVALUATING = functools.partial(BatchNorm, use_running_average=True)


class Reveal(nn.Module):
    """A block that tells what it was given: x becomes 10 x + its rate."""

    features: int
    strides: int
    dilation: tuple[int, int]
    position: str = "inner"
    tell: Callable = lambda block: None

    @nn.compact
    def __call__(self, x, drop_rate=0.0):
        self.tell(self)
        return 10 * x + drop_rate


@pytest.mark.parametrize(("first", "position"), [(True, "net"), (False, "stage")])
def test_the_first_block_moves_and_the_others_stay(first, position):
    log = []

    def tell(block):
        given = (block.features, block.strides, block.dilation, block.position)
        log.append((block.name, *given))

    block = functools.partial(Reveal, tell=tell)
    stage = Stage(3, 7, 2, block, dilation=(1, 2), first=first)
    stage.apply({}, np.zeros((1, 2, 2, 1)))
    assert log == [
        ("block1", 7, 2, (1, 2), position),
        ("block2", 7, 1, (2, 2), "inner"),
        ("block3", 7, 1, (2, 2), "inner"),
    ]


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_every_block_is_given_its_own_rate_in_order(scan, remat):
    rates = (0.1, 0.2, 0.3, 0.4)
    stage = Stage(4, 1, 1, Reveal, drop_rates=rates, scan=scan, remat=remat)
    y = jax.jit(stage.apply)({}, np.zeros((1, 1, 1, 1), np.float32))
    assert float(y[0, 0, 0, 0]) == pytest.approx(123.4, rel=1e-6)
    stage = Stage(4, 1, 1, Reveal, scan=scan, remat=remat)
    y = jax.jit(stage.apply)({}, np.ones((1, 1, 1, 1), np.float32))
    assert float(y[0, 0, 0, 0]) == 10_000


def test_the_rates_of_a_net_grow_through_all_its_stages():
    """Huang et al. 2016: block l of L with l / L times the last one's rate."""
    rates = {}

    class Recording(BasicBlock):
        @nn.compact
        def __call__(self, x, drop_rate=0.0):
            rates["/".join(self.path)] = drop_rate
            return super().__call__(x, drop_rate)

    model = ResNet((1, 2, 2), Recording, stem=CifarStem, width=2, num_classes=2)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    jax.eval_shape(model.clone(stochastic_depth_rate=0.5).init, KEY, images)
    names = ["stage1/block1", "stage2/block1", "stage2/block2", "stage3/block1"]
    names.append("stage3/block2")
    assert rates == {n: pytest.approx(0.1 * i) for i, n in enumerate(names, start=1)}
    jax.eval_shape(model.init, KEY, images)
    assert set(rates.values()) == {0.0}


# Overlapping shortcuts


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(2, 5, 6, 4)).astype(np.float32)


def basic(letter, **fields):
    return functools.partial(
        BasicBlock, norm=EVALUATING, shortcut=shortcuts.BY_NAME[letter], **fields
    )


@pytest.mark.parametrize(
    ("letter", "strides", "dilation"),
    [
        ("A", 2, (1, 1)),
        ("B", 2, (1, 1)),
        ("C", 1, (1, 1)),
        ("B", 1, (1, 2)),
        ("pooled", 2, (1, 1)),
    ],
)
def test_spans_of_two_that_do_not_overlap_are_the_ordinary_blocks(
    x, letter, strides, dilation
):
    ordinary = Stage(2, 6, strides, basic(letter), dilation=dilation)
    chain = OverlappingStage(
        2, 6, strides, basic(letter), dilation=dilation, every=2, span=2
    )
    variables = random_variables(ordinary, x)
    renamed = {
        collection: {
            f"layer{2 * block + index - 2}": {
                name.replace(str(index), "1"): leaves
                for name, leaves in tree[f"block{block}"].items()
                if name in (f"conv{index}", f"norm{index}")
                or (index == 2 and name.startswith("shortcut"))
            }
            for block in (1, 2)
            for index in (1, 2)
        }
        for collection, tree in variables.items()
    }
    shapes = jax.eval_shape(chain.init, KEY, x)
    assert jax.tree.structure(shapes) == jax.tree.structure(renamed)
    ours, expected = apply(chain, renamed, x), apply(ordinary, variables, x)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def overlapping_by_hand(x, variables, letter, size, every, span, strides, features):
    """h_k = relu(BN(conv(h_{k-1})) + shortcut(h_{k-span})), from every ``every``-th."""
    maps = [x]
    for k in range(1, 2 * size + 1):
        layers = Layers({c: tree[f"layer{k}"] for c, tree in variables.items()})
        step = strides if k == 1 else 1
        y = layers.norm(layers.conv(maps[-1], "conv1", step), "norm1")
        if k >= span and (k - span) % every == 0:
            branch = maps[k - span]
            step = strides if k == span else 1
            if branch.shape[-1] == features:
                y = y + branch
            elif letter == "A":
                extra = features - branch.shape[-1]
                y = y + np.pad(branch[:, ::step, ::step], [(0, 0)] * 3 + [(0, extra)])
            else:
                branch = layers.conv(branch, "shortcut_conv", step)
                y = y + layers.norm(branch, "shortcut_norm")
        maps.append(relu(y))
    return maps[-1]


@pytest.mark.parametrize(
    ("letter", "every", "span"),
    [("A", 1, 2), ("B", 1, 2), ("A", 1, 1), ("B", 1, 3), ("A", 2, 3), ("A", 3, 2)],
)
def test_overlapping_shortcuts_by_hand(x, letter, every, span):
    stage = OverlappingStage(3, 6, 2, basic(letter), every=every, span=span)
    variables = random_variables(stage, x)
    expected = overlapping_by_hand(x, variables, letter, 3, every, span, 2, 6)
    y = apply(stage, variables, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_overlapping_shortcuts_cost_no_parameters_with_option_a():
    """The plain net's, wherever the shortcuts start: only they differ."""

    def shapes(letter, **fields):
        model = create_model("cifar_resnet14", shortcut=letter).clone(**fields)
        images = jnp.zeros((1, 8, 8, 3))
        logits, variables = jax.eval_shape(model.init_with_output, KEY, images)
        assert logits.shape == (1, 10)
        return jax.tree.map(np.shape, variables["params"])

    chains = [
        shapes(letter, stage=functools.partial(OverlappingStage, every=every, span=2))
        for letter, every in (("A", 1), ("A", 2), ("none", 1))
    ]
    assert chains[0] == chains[1] == chains[2]
    assert set(chains[0]["stage2"]) == {"layer1", "layer2", "layer3", "layer4"}
    sizes = [
        sorted(np.prod(shape) for shape in jax.tree.leaves(tree, is_leaf=is_shape))
        for tree in (chains[0], shapes("A"))
    ]
    assert sizes[0] == sizes[1]


def is_shape(value):
    return isinstance(value, tuple)


@pytest.mark.parametrize(
    "options", [{"drop_rates": (0.1, 0.2)}, {"scan": True}, {"remat": True}], ids=str
)
def test_overlapping_stages_refuse_what_they_have_not(x, options):
    stage = OverlappingStage(2, 4, 1, basic("A"), **options)
    with pytest.raises(ValueError, match="overlapping shortcuts have no"):
        stage.init(KEY, x)


# Loops and remat: the same net


NETS = {
    "basic": ResNet(
        (3, 1), BasicBlock, shortcuts.ZeroPad(), CifarStem, width=4, num_classes=3
    ),
    "preactivated bottlenecks, gated": ResNet(
        (3,),
        functools.partial(
            PreActBottleneckBlock, stride_version="v1", squeeze_excite=SqueezeExcite
        ),
        shortcuts.Projection(normalized=False),
        CifarStem,
        width=2,
        num_classes=3,
    ),
}


@functools.cache
def evaluated(net, scan, remat):
    """In float64: logits in evaluation and training, gradients, new statistics."""
    rng = np.random.default_rng(0)
    model = NETS[net].clone(dtype=jnp.float64, scan=scan, remat=remat)
    images = rng.normal(0.3, 1, (4, 6, 6, 3))
    cotangent = rng.normal(size=(4, 3))
    variables = random_variables(NETS[net], np.float32(images), dtype=np.float64)

    def run(variables, images):
        variables = stack_blocks(variables) if scan else variables

        def loss(params, images):
            logits, updated = model.apply(
                variables | {"params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.vdot(logits, cotangent), (logits, updated["batch_stats"])

        gradients, (logits, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            variables["params"], images
        )
        return {
            "logits": logits,
            "evaluation": model.apply(variables, images),
            "params": gradients[0],
            "images": gradients[1],
            "batch_stats": stats,
        }

    with double_precision():
        results = jax.jit(run)(variables, images)
        assert results["logits"].dtype == np.float64
        return jax.tree.map(np.asarray, results)


@pytest.mark.parametrize(
    ("net", "scan", "remat"),
    [
        ("basic", True, False),
        ("basic", False, True),
        ("preactivated bottlenecks, gated", True, True),
    ],
)
def test_loops_and_remat_compute_the_same(net, scan, remat):
    expected = evaluated(net, scan=False, remat=False)
    ours = evaluated(net, scan=scan, remat=remat)
    if scan:
        with double_precision():
            names = ("params", "batch_stats")
            expected = expected | {n: stack_blocks(expected[n]) for n in names}
            expected = jax.tree.map(np.asarray, expected)
        assert set(ours["params"]["stage1"]) == {"block1", "blocks"}
        # A single block has no loop.
        assert set(ours["params"].get("stage2", {})) <= {"block1"}
    assert_trees_close(ours, expected, 1e-9)
    # That there is something to compare.
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(expected))


def test_remat_computes_again_and_a_loop_keeps_one_body():
    """Convolutions in the traced gradient of stages of 4: what each option is for."""
    stage_of = functools.partial(Stage, 4, 4, 1, basic("A"))
    images = np.zeros((1, 6, 6, 4), np.float32)

    def convolutions(**options):
        stage = stage_of(**options)
        variables = jax.eval_shape(stage.init, KEY, images)
        gradient = jax.grad(lambda v, x: stage.apply(v, x).sum())
        return count_convolutions(jax.make_jaxpr(gradient)(variables, images).jaxpr)

    unrolled, looped = convolutions(), convolutions(scan=True)
    assert looped == unrolled // 2  # of 4 blocks two are written down
    assert convolutions(remat=True) > unrolled
    assert convolutions(remat=True, scan=True) > looped


def count_convolutions(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == "conv_general_dilated"
        for value in equation.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    total += count_convolutions(inner)
    return total


def test_the_blocks_of_a_loop_start_independently():
    stage = Stage(5, 32, 1, basic("A"), scan=True)
    x = jnp.zeros((1, 4, 4, 32))
    params = jax.jit(stage.init)(jax.random.key(0), x)["params"]
    for name in ("conv1", "conv2"):
        kernels = np.asarray(params["blocks"][name]["kernel"], np.float64)
        assert kernels.shape == (4, 3, 3, 32, 32)
        drawn = [params["block1"][name]["kernel"], *kernels]
        flat = np.stack([np.ravel(kernel) for kernel in drawn])
        correlation = np.corrcoef(flat)
        np.testing.assert_allclose(
            correlation, np.eye(5), atol=5 / np.sqrt(flat[0].size)
        )
        # He's variance by the fan-out of one block, not of the stacked array.
        error = 5 * np.sqrt(2 / flat[0].size)
        np.testing.assert_allclose(flat.var(1), 2 / (9 * 32), rtol=error)
    conv1, conv2 = (params["blocks"][f"conv{i}"]["kernel"] for i in (1, 2))
    assert abs(np.corrcoef(np.ravel(conv1), np.ravel(conv2))[0, 1]) < 0.05


# Stochastic depth within a loop


RATES = (0.15, 0.3, 0.45, 0.6)


def dropping_stage(**options):
    block = basic(
        "A", stochastic_depth=functools.partial(StochasticDepth, deterministic=False)
    )
    return Stage(4, 3, 1, block, drop_rates=RATES, **options)


@pytest.fixture(scope="module")
def small():
    """Many examples of a small map, and variables of the unrolled stage."""
    x = np.random.default_rng(2).uniform(0, 1, (512, 2, 2, 3)).astype(np.float32)
    return x, random_variables(Stage(4, 3, 1, basic("A")), x)


def stacked(variables):
    """Those of a stage alone."""
    return {
        name: stack_blocks({"stage1": tree})["stage1"]
        for name, tree in variables.items()
    }


def with_kept(x, variables, kept):
    """The stage where example i's residual functions are kept or not."""
    for number, (is_kept, rate) in enumerate(zip(kept, RATES), start=1):
        layers = Layers({c: tree[f"block{number}"] for c, tree in variables.items()})
        y = relu(layers.norm(layers.conv(x, "conv1"), "norm1"))
        y = layers.norm(layers.conv(y, "conv2"), "norm2")
        x = relu(x + y * is_kept / (1 - rate))
    return x


@pytest.mark.parametrize(("scan", "remat"), [(False, False), (True, True)])
def test_blocks_are_dropped_independently_each_at_its_rate(small, scan, remat):
    x, variables = small
    patterns = np.array(list(itertools.product((0, 1), repeat=4)))
    possible = np.stack([with_kept(x, variables, kept) for kept in patterns])
    stage = dropping_stage(scan=scan, remat=remat)
    stacked = (
        stack_blocks({"stage1": variables["params"]})["stage1"],
        stack_blocks({"stage1": variables["batch_stats"]})["stage1"],
    )
    if scan:
        variables = {"params": stacked[0], "batch_stats": stacked[1]}
    y = apply(stage, variables, x, rngs={"dropout": jax.random.key(0)})
    errors = np.abs(possible - np.asarray(y)).max((2, 3, 4))
    assert (errors.min(0) < 1e-3).all()  # each example is one of the 16 cases
    kept = patterns[errors.argmin(0)]
    for rates, column in zip(RATES, kept.T):
        error = 5 * np.sqrt(rates * (1 - rates) / len(x))
        assert 1 - column.mean() == pytest.approx(rates, abs=error)
    correlation = np.corrcoef(kept.T)
    np.testing.assert_allclose(correlation, np.eye(4), atol=5 / np.sqrt(len(x)))
    again = apply(stage, variables, x, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(again, y)


def test_remat_draws_the_same_again(small):
    """A finite difference through the draw of one key is the gradient's product."""
    x, variables = small[0][:16].astype(np.float64), small[1]
    stage = dropping_stage(scan=True, remat=True)
    variables = stacked(variables)
    direction = np.random.default_rng(3).normal(size=x.shape)
    with double_precision():
        norm = functools.partial(EVALUATING, dtype=jnp.float64)
        conv = functools.partial(Conv, dtype=jnp.float64)
        stage = stage.clone(block=functools.partial(stage.block, norm=norm, conv=conv))
        variables = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)

        def total(x):
            rngs = {"dropout": jax.random.key(1)}
            return jnp.sin(stage.apply(variables, x, rngs=rngs)).sum()

        step, compiled = 1e-6 * direction, jax.jit(total)
        slope = jnp.vdot(jax.jit(jax.grad(total))(x), step)
        difference = compiled(x + step) - compiled(x - step)
    assert float(difference) / 2 == pytest.approx(float(slope), rel=1e-5)
