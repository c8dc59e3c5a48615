"""The shortcuts by themselves (He et al. 2015, section 3.3; 2016, section 3.1)."""

import dataclasses
import functools

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
    Highway,
    ResNet,
    create_model,
    pooling,
    precise_batch_stats,
    shortcuts,
)
from tests.models.reference import (
    KEY,
    Layers,
    apply,
    assert_trees_equal,
    random_variables,
)

average_pool = jax.jit(pooling.average_pool, static_argnums=(1, 2, 3))
EVALUATING = functools.partial(BatchNorm, use_running_average=True)


class Shortcut(nn.Module):
    """Calls a shortcut inside a compact scope, as a block does."""

    shortcut: shortcuts.Shortcut
    like: tuple[int, ...]
    strides: int
    dilation: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x, residual=None, train=False):
        if residual is None:
            residual = jnp.zeros(self.like, x.dtype)
        shortcut = self.shortcut
        if isinstance(shortcut, shortcuts.Dropped):
            shortcut = dataclasses.replace(shortcut, train=train)
        carried, factor = shortcut(
            x, residual.shape[-1], self.strides, Conv, EVALUATING, self.dilation
        )
        residual = residual if factor is None else factor * residual
        return residual if carried is None else residual + carried


def call(shortcut, x, like_shape, strides):
    """What is added to a residual function of zero, and the parameters' shapes."""
    if isinstance(shortcut, str):
        shortcut = shortcuts.BY_NAME[shortcut]
    module = Shortcut(shortcut, like_shape, strides)
    y, variables = jax.jit(module.init_with_output)(KEY, x)
    return y, jax.tree.map(np.shape, variables.get("params", {}))


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)


def test_option_a_keeps_every_strides_th_pixel_and_appends_zeros(x):
    y, params = call("A", x, (2, 3, 2, 7), 2)
    assert params == {}
    assert y.shape == (2, 3, 2, 7)
    for i in range(3):
        for j in range(2):
            np.testing.assert_array_equal(y[:, i, j, :3], x[:, 2 * i, 2 * j])
    assert (np.asarray(y[..., 3:]) == 0).all()


def test_option_a_keeps_the_dtype(x):
    y, _ = call("A", x.astype("bfloat16"), (2, 3, 2, 7), 2)
    assert y.dtype == "bfloat16"


def test_option_a_cannot_remove_channels(x):
    with pytest.raises(ValueError, match=r"from 3 to 2 channels.*projection"):
        call("A", x, (2, 5, 4, 2), 1)


@pytest.mark.parametrize("letter", ["A", "B"])
def test_the_identity_where_the_shape_stays(x, letter):
    y, params = call(letter, x, x.shape, 1)
    assert params == {}
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize(
    ("letter", "strides", "like"),
    [("B", 2, (2, 3, 2, 7)), ("B", 1, (2, 5, 4, 7)), ("C", 1, (2, 5, 4, 3))],
)
def test_projections_are_a_1x1_convolution_and_its_norm(x, letter, strides, like):
    y, params = call(letter, x, like, strides)
    assert y.shape == like
    assert params == {
        "shortcut_conv": {"kernel": (1, 1, 3, like[-1])},
        "shortcut_norm": {"scale": (like[-1],), "bias": (like[-1],)},
    }


@pytest.mark.parametrize("dilation", [(1, 1), (2, 4)], ids=["ordinary", "dilated"])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("letter", ["B", "C"])
def test_a_projection_is_w_s_x(x, letter, strides, dilation):
    """Equation 2: a matrix for every strides-th pixel, whatever the spacing of taps."""
    like = (2, -(-5 // strides), 4 // strides, 7)
    module = Shortcut(shortcuts.BY_NAME[letter], like, strides, dilation)
    variables = random_variables(module, x)
    layers = Layers(variables)
    matrix = layers.params["shortcut_conv"]["kernel"][0, 0]
    expected = layers.norm(x[:, ::strides, ::strides] @ matrix, "shortcut_norm")
    y = apply(module, variables, x)
    assert y.shape == like
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_a_bare_projection_has_no_normalisation(x):
    bare = shortcuts.Projection(normalized=False)
    y, params = call(bare, x, (2, 3, 2, 7), 2)
    assert y.shape == (2, 3, 2, 7)
    assert params == {"shortcut_conv": {"kernel": (1, 1, 3, 7)}}
    assert call(bare, x, x.shape, 1)[1] == {}


def means(x, window, strides, spacing):
    """Of the pixels of each window that lie within the map, as loops."""
    height, width = (-(-side // strides) for side in x.shape[1:3])
    y = np.zeros((len(x), height, width, x.shape[-1]))
    for i in range(height):
        for j in range(width):
            rows = [i * strides + p * spacing for p in range(window)]
            columns = [j * strides + p * spacing for p in range(window)]
            rows = [row for row in rows if row < x.shape[1]]
            columns = [column for column in columns if column < x.shape[2]]
            y[:, i, j] = x[:, rows][:, :, columns].mean((1, 2))
    return y


@pytest.mark.parametrize(
    ("window", "strides", "spacing"), [(1, 1, 1), (2, 2, 1), (2, 1, 1), (2, 1, 2)]
)
@pytest.mark.parametrize("sides", [(6, 8), (7, 5), (1, 2)])
def test_average_pool(window, strides, spacing, sides):
    x = np.random.default_rng(0).normal(size=(2, *sides, 3)).astype(np.float32)
    y = average_pool(x, window, strides, spacing)
    expected = means(x, window, strides, spacing)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (7, 5)])
def test_average_pool_is_torchs(height, width):
    """ceil_mode, and count_include_pad=False: as timm's ResNet-D has it."""
    torch = pytest.importorskip("torch", reason="torch is the reference of this test")
    x = np.random.default_rng(0).normal(size=(2, height, width, 3))
    pool = torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    expected = pool(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    ours = average_pool(x.astype(np.float32), 2, 2)
    np.testing.assert_allclose(ours, expected.transpose(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("strides", "dilation", "window", "spacing"),
    [
        (2, (1, 1), 2, 1),
        (1, (1, 1), 1, 1),
        (1, (1, 2), 2, 1),
        (1, (2, 4), 2, 2),
        (1, (2, 2), 1, 1),
    ],
)
def test_a_pooled_projection_skips_no_pixel(x, strides, dilation, window, spacing):
    """Where dilation stands for a stride, the window stays and its pixels spread."""
    like = (2, -(-5 // strides), 4 // strides, 7)
    module = Shortcut(shortcuts.BY_NAME["pooled"], like, strides, dilation)
    variables = random_variables(module, x)
    layers = Layers(variables)
    pooled = means(x, window, strides, spacing)
    matrix = layers.params["shortcut_conv"]["kernel"][0, 0]
    expected = layers.norm(pooled @ matrix, "shortcut_norm")
    y = apply(module, variables, x)
    assert y.shape == like
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_a_pooled_projection_of_an_unchanged_map_is_the_identity(x):
    y, params = call("pooled", x, x.shape, 1)
    assert params == {}
    np.testing.assert_array_equal(y, x)


# What He et al. 2016 compare with the identity


CHANGES = [(1, (2, 5, 4, 3)), (2, (2, 3, 2, 7))]


def padded(x, strides, features):
    """Option A, one pixel after another."""
    y = np.zeros((len(x), *(-(-side // strides) for side in x.shape[1:3]), features))
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            y[:, i, j, : x.shape[-1]] = x[:, strides * i, strides * j]
    return y


def joined(shortcut, x, like, strides, **options):
    """The sum, the residual function's part, and the variables."""
    residual = np.random.default_rng(1).normal(size=like).astype(np.float32)
    module = Shortcut(shortcut, like, strides)
    variables = random_variables(module, x)
    y = jax.jit(functools.partial(module.apply, **options))(variables, x, residual)
    return np.asarray(y), residual, variables


@pytest.mark.parametrize(("strides", "like"), CHANGES)
@pytest.mark.parametrize(("name", "factor"), [("scaled", 1.0), ("scaled_both", 0.5)])
def test_constant_scaling(x, name, factor, strides, like):
    y, residual, variables = joined(shortcuts.BY_NAME[name], x, like, strides)
    assert not variables
    expected = 0.5 * padded(x, strides, like[-1]) + factor * residual
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize(("strides", "like"), CHANGES)
@pytest.mark.parametrize("name", ["exclusive_gate", "shortcut_gate"])
def test_gating(x, name, strides, like):
    y, residual, variables = joined(shortcuts.BY_NAME[name], x, like, strides)
    gate = variables["params"].pop("shortcut_gate")
    assert not variables["params"]
    matrix = gate["kernel"][0, 0]
    assert matrix.shape == (3, like[-1])
    logits = x[:, ::strides, ::strides] @ matrix + gate["bias"]
    g = 1 / (1 + np.exp(-logits))
    expected = residual * (g if name == "exclusive_gate" else 1)
    expected += (1 - g) * padded(x, strides, like[-1])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [-6.0, 0.0, -1.5])
def test_gates_start_at_their_bias(x, bias):
    module = Shortcut(shortcuts.Gated(True, bias), x.shape, 1)
    gate = jax.jit(module.init)(KEY, x)["params"]["shortcut_gate"]
    np.testing.assert_array_equal(gate["bias"], np.full(3, bias, np.float32))


def test_exclusive_gates_between_equal_shapes_are_highway_layers(x):
    """y = H(x) T(x) + x (1 - T(x)) of Srivastava et al., by the module of that name."""
    y, residual, variables = joined(shortcuts.Gated(True), x, x.shape, 1)
    params = variables["params"]["shortcut_gate"]
    highway = Highway(
        lambda x: jnp.asarray(residual),
        lambda x: x @ params["kernel"][0, 0] + params["bias"],
    )
    np.testing.assert_allclose(y, highway.apply({}, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("strides", "like"), CHANGES)
def test_dropout_of_the_shortcut(x, strides, like):
    """In training half of the elements are doubled and the others left out."""
    shortcut = shortcuts.BY_NAME["dropout"]
    whole = padded(x, strides, like[-1])
    y, residual, variables = joined(shortcut, x, like, strides)
    assert not variables
    np.testing.assert_allclose(y, residual + whole, rtol=1e-6)
    options = {"train": True, "rngs": {"dropout": KEY}}
    y, residual, _ = joined(shortcut, x, like, strides, **options)
    kept = np.isclose(y, residual + 2 * whole, rtol=1e-5)
    np.testing.assert_allclose(y[~kept], residual[~kept], rtol=1e-6)
    share = kept[..., : x.shape[-1]].mean()
    count = kept[..., : x.shape[-1]].size
    assert abs(share - 0.5) < 4 * np.sqrt(0.25 / count)


# Costs


@pytest.mark.parametrize(("strides", "features"), [(1, 3), (2, 6)])
def test_option_a_costs_no_parameters(x, strides, features):
    """Section 4.1: with option A a residual net has those of the plain one."""

    def params(shortcut):
        block = BasicBlock(features, strides, EVALUATING, shortcut)
        return jax.tree.map(np.shape, jax.eval_shape(block.init, KEY, x))

    assert params(shortcuts.ZeroPad()) == params(shortcuts.NoShortcut())
    assert params(shortcuts.ZeroPad()) != params(shortcuts.Projection(everywhere=True))


@pytest.mark.parametrize(("strides", "like"), [(1, (2, 5, 4, 3)), (2, (2, 3, 2, 7))])
def test_plain_nets_add_nothing(x, strides, like):
    module = Shortcut(shortcuts.NoShortcut(), like, strides)
    residual = np.random.default_rng(1).normal(size=like).astype(np.float32)
    y, variables = module.init_with_output(KEY, x, residual)
    assert not variables
    np.testing.assert_array_equal(y, residual)


def test_what_a_projection_creates_does_not_depend_on_the_size_of_the_image():
    """On a 1x1 map a stride changes no shape; the parameters must be there still."""
    for shortcut in (shortcuts.Projection(), shortcuts.Projection(pooled=True)):
        block = BasicBlock(8, 2, EVALUATING, shortcut)
        trees = [
            jax.eval_shape(block.init, KEY, jnp.ones((1, side, side, 8)))
            for side in (1, 4)
        ]
        assert trees[0] == trees[1]
        assert "shortcut_conv" in trees[0]["params"]


def test_the_names_of_the_options():
    assert {
        "A": shortcuts.ZeroPad(),
        "B": shortcuts.Projection(False, True, False),
        "C": shortcuts.Projection(True, True, False),
        "pooled": shortcuts.Projection(False, True, True),
        "none": shortcuts.NoShortcut(),
        "scaled": shortcuts.Scaled(0.5, 1.0),
        "scaled_both": shortcuts.Scaled(0.5, 0.5),
        "exclusive_gate": shortcuts.Gated(True, -6.0),
        "shortcut_gate": shortcuts.Gated(False, -6.0),
        "dropout": shortcuts.Dropped(0.5),
    } == shortcuts.BY_NAME


# In whole nets


@pytest.mark.parametrize("name", ["scaled_both", "exclusive_gate", "shortcut_gate"])
def test_the_net_passes_them_on(x, name):
    """A stage of one block: the stem's map, joined to its residual function."""
    model = ResNet(
        (1,),
        shortcut=shortcuts.BY_NAME[name],
        stem=CifarStem,
        width=4,
        num_classes=None,
        norm=functools.partial(BatchNorm, fused=False),  # its output is not the sum
    )
    variables = random_variables(model, x)
    _, seen = model.apply(variables, x, capture_intermediates=True)
    seen = seen["intermediates"]
    stem, block = seen["stem"]["__call__"][0][0], seen["stage1"]["block1"]
    module = Shortcut(model.shortcut, stem.shape, 1)
    params = variables["params"]["stage1"]["block1"]
    own = {key: params[key] for key in params if key.startswith("shortcut")}
    total = module.apply({"params": own}, stem, block["norm2"]["__call__"][0])
    np.testing.assert_allclose(
        block["__call__"][0], np.maximum(total, 0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("scan", [False, True])
def test_shortcuts_are_dropped_in_training_alone(x, scan):
    model = ResNet((3,), stem=CifarStem, width=3, num_classes=2, scan=scan).clone(
        shortcut=shortcuts.Dropped()
    )
    variables = random_variables(model, x)
    evaluated = apply(model, variables, x)
    whole = model.clone(shortcut=shortcuts.ZeroPad())
    np.testing.assert_allclose(evaluated, apply(whole, variables, x), rtol=1e-6)
    first, again, other = (
        apply(model, variables, x, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_precise_statistics_are_taken_with_whole_shortcuts(x):
    model = ResNet((1,), stem=CifarStem, width=3, num_classes=2)
    variables = random_variables(model, x)
    dropped, whole = (
        precise_batch_stats(model.clone(shortcut=shortcut), variables, [x])
        for shortcut in (shortcuts.Dropped(), shortcuts.ZeroPad())
    )
    assert_trees_equal(dropped, whole)


@pytest.mark.parametrize("name", ["exclusive_gate", "shortcut_gate"])
def test_a_gate_costs_a_1x1_convolution_with_bias(name):
    """54 blocks of ResNet-110: 18 of each width, two of them change it."""

    def count(**options):
        model = create_model("cifar_resnet110", scan=True, **options)
        shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 32, 32, 3)))
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))

    gates = 18 * 16 * 17 + 17 * 32 * 33 + 17 * 64 * 65 + 17 * 32 + 33 * 64
    assert count(shortcut=name) - count() == gates
