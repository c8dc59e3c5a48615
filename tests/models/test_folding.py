"""A folded net computes what the net with batch normalisation does in evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.models import (
    VGG,
    BasicBlock,
    BatchNorm,
    BottleneckBlock,
    CifarStem,
    DeepStem,
    HighwayNet,
    ImageNetStem,
    NoNorm,
    OverlappingStage,
    PreActBasicBlock,
    ResNet,
    SqueezeExcite,
    create_model,
    fold_batch_norm,
    shortcuts,
    stack_blocks,
)
from tests.models.reference import (
    KEY,
    apply,
    assert_trees_close,
    double_precision,
    random_variables,
)


def cifar(block, shortcut, **options):
    fields = {"stem": CifarStem, "width": 4, "num_classes": 3} | options
    return ResNet((2, 1), block, shortcut, **fields)


SQUEEZED = functools.partial(BasicBlock, squeeze_excite=SqueezeExcite)
NETS = {
    "A": cifar(
        BasicBlock, shortcuts.ZeroPad(), norm=functools.partial(BatchNorm, epsilon=0.1)
    ),
    "B": cifar(
        functools.partial(BottleneckBlock, zero_init_last=True),
        shortcuts.Projection(),
        stem=ImageNetStem,
    ),
    "C, scanned": cifar(
        BasicBlock, shortcuts.Projection(everywhere=True), scan=True, stem=DeepStem
    ),
    "projections without normalisation": cifar(
        BasicBlock, shortcuts.Projection(everywhere=True, normalized=False), scan=True
    ),
    "plain": cifar(BasicBlock, shortcuts.NoShortcut()),
    "gated": cifar(BasicBlock, shortcuts.Gated(exclusive=True)),
    "squeezed": cifar(
        SQUEEZED, shortcuts.Projection(), norm=functools.partial(BatchNorm, fused=True)
    ),
    "features": cifar(BasicBlock, shortcuts.ZeroPad(), num_classes=None),
    "overlapping": cifar(
        BasicBlock,
        shortcuts.ZeroPad(),
        stage=functools.partial(OverlappingStage, every=1, span=2),
    ),
    "VGG": VGG((2, 1), (4, 6), num_classes=3, hidden_features=8, batch_norm=True),
}


def problem_of(model, dtype=np.float32):
    images = np.random.default_rng(0).normal(0.3, 1, (2, 16, 16, 3)).astype(dtype)
    return random_variables(model, np.float32(images), dtype=dtype), images


@pytest.mark.parametrize("name", NETS)
def test_in_float64_it_computes_the_same(name):
    model = NETS[name].clone(dtype=jnp.float64)
    variables, images = problem_of(NETS[name], np.float64)
    with double_precision():
        folded, folded_variables = fold_batch_norm(model, variables)
        assert set(folded_variables) == {"params"}
        expected = apply(model, variables, images, train=False)
        ours = apply(folded, folded_variables, images, train=False)
        assert ours.dtype == expected.dtype
        maps = model.apply(variables, images, method="features")
        folded_maps = folded.apply(folded_variables, images, method="features")
    assert_trees_close(ours, expected, 1e-12)
    assert_trees_close(folded_maps, maps, 1e-12)


def test_the_folded_tree_is_that_of_a_net_without_normalisation():
    """So that all which works on its variables does: saving, stacking, freezing."""
    model = NETS["A"]
    variables, images = problem_of(model)
    folded, folded_variables = fold_batch_norm(model, variables)
    fresh = jax.eval_shape(folded.init, KEY, images)
    assert jax.tree.map(np.shape, folded_variables) == jax.tree.map(np.shape, fresh)
    stacked = fold_batch_norm(model.clone(scan=True), stack_blocks(variables))
    assert_trees_close(stacked[1], stack_blocks(folded_variables), 1e-6)


@pytest.mark.slow
def test_resnet50_agrees_to_rounding_in_both_types():
    for dtype, error in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.03)):
        model = create_model("resnet50", num_classes=10, dtype=dtype)
        rng = np.random.default_rng(0)
        images = rng.normal(0, 1, (2, 64, 64, 3)).astype(np.float32)
        variables = random_variables(model, images)
        expected = np.asarray(apply(model, variables, images, train=False))
        folded, params = fold_batch_norm(model, variables)
        ours = np.asarray(apply(folded, params, images, train=False))
        assert np.abs(ours - expected).max() < error * np.abs(expected).max()
        assert np.abs(ours - expected).max() > 0


def test_no_normalisation_is_left_in_the_program():
    model = NETS["B"]
    variables, images = problem_of(model)

    def roots(net, variables):
        forward = functools.partial(net.apply, train=False)
        return str(jax.make_jaxpr(forward)(variables, images)).count("rsqrt")

    assert roots(model, variables) == 12
    assert roots(*fold_batch_norm(model, variables)) == 0


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (cifar(PreActBasicBlock, shortcuts.ZeroPad()), "pre-activation"),
        (cifar(BasicBlock, shortcuts.ZeroPad(), norm=NoNorm), "no batch norm"),
        (
            VGG((1,), (4,), hidden_features=8),
            "no batch normalisation to fold in .* VGG",
        ),
        (HighwayNet(), "this HighwayNet"),
    ],
)
def test_what_cannot_be_folded_is_refused(model, words):
    with pytest.raises(UserError, match=words):
        fold_batch_norm(model, {"params": {}})


def test_another_net_s_variables_are_refused():
    variables, _ = problem_of(NETS["A"])
    others = (
        {"params": variables["params"]},
        {"params": {"dense": {}}},
        problem_of(NETS["B"])[0],
        stack_blocks(variables),
    )
    for other in others:
        with pytest.raises(UserError, match="do not fit this ResNet"):
            fold_batch_norm(NETS["A"], other)
