"""Summaries against closed forms, and receptive fields against the maps themselves."""

import functools
import io
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from flax import linen as nn

from resnet_jax.analysis.complexity import (
    abstract_variables,
    count_multiply_adds,
    count_parameters,
)
from resnet_jax.analysis.summary import render, summarize, summarize_named
from resnet_jax.errors import UserError
from resnet_jax.models import create_model


class Part(nn.Module):
    """A function of a map, which may create layers; its parameter makes it a row."""

    function: Callable

    @nn.compact
    def __call__(self, x):
        return self.function(x) * self.param("scale", nn.initializers.ones, ())


class Net(nn.Module):
    """Parts one after the other: part1, part2, ..."""

    functions: tuple[Callable, ...]

    @nn.compact
    def __call__(self, x, train=False):
        for index, function in enumerate(self.functions, start=1):
            x = Part(function, name=f"part{index}")(x)
        return x


def rows_of(model, image_shape, depth=1):
    return {row.name: row for row in summarize(model, image_shape, depth)}


def row_of(*functions, image_shape=(24, 20, 3)):
    return list(rows_of(Net(functions), image_shape).values())[-1]


# Receptive fields


def positive_variables(model, image_shape):
    """Kernels of positive random numbers; each layer is a mean, so none overflows."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if len(leaf.shape) > 1:
            values = rng.uniform(0.5, 1, leaf.shape) / math.prod(leaf.shape[:-1])
            return values.astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    abstract = abstract_variables(model, image_shape)
    return jax.tree_util.tree_map_with_path(fill, abstract)


def pixels_seen(model, image_shape, name, axis, base):
    """Which rows (axis 0) or columns (1) of the image a module's middle position sees.

    Those that change its output when they alone are lit, in an image of ``base``
    elsewhere. Every layer is monotone; unlike a gradient, this finds all that a
    max-pooling sees. A base of zero keeps the smallest traces exact.
    """
    side = image_shape[axis]
    lit = np.eye(side + 1, side, dtype=np.float32)  # the last image is not lit at all
    lit = lit[:, :, None, None] if axis == 0 else lit[:, None, :, None]
    images = np.broadcast_to(base + lit, (side + 1, *image_shape))

    @jax.jit
    def map_of(variables, images):
        _, state = model.apply(
            variables,
            images,
            train=False,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.path == (name,),
        )
        return jax.tree.leaves(state["intermediates"])[-1]

    array = np.asarray(map_of(positive_variables(model, image_shape), images))
    middle = [size // 2 for size in array.shape[1:3]]
    values = array[:, middle[0], middle[1]]
    change = np.abs(values[:-1] - values[-1]).max(-1)
    return middle[axis], np.flatnonzero(change > 1e-6 * base)


def check_field(model, image_shape, name, axes=(0, 1), base=0):
    row = rows_of(model, image_shape)[name]
    for axis in axes:
        position, seen = pixels_seen(model, image_shape, name, axis, base)
        first = row.first_pixel[axis] + position * row.stride[axis]
        last = first + row.receptive_field[axis] - 1
        assert first > 0, "the image is too small to show the field's beginning"
        assert last < image_shape[axis] - 1, "the image is too small for its end"
        assert (seen[0], seen[-1]) == (first, last)


@pytest.mark.parametrize(
    ("name", "module", "image_shape", "field", "stride"),
    [
        ("cifar_resnet20", "stage1", (32, 20, 3), 15, 1),
        ("cifar_resnet20", "stage2", (64, 8, 3), 37, 2),
        ("resnet18", "stem", (32, 16, 3), 11, 4),
        ("resnet18", "stage1", (80, 16, 3), 43, 4),
    ],
)
def test_field_of_named_nets(name, module, image_shape, field, stride):
    # A width of 8 channels: the field does not depend on it.
    model = create_model(name).clone(width=8)
    check_field(model, image_shape, module, axes=(0,))
    row = rows_of(model, image_shape)[module]
    assert row.receptive_field == (field, field)
    assert row.stride == (stride, stride)


def shifted_sum(x):
    """2x2 means of stride 2, as a sum of slices."""
    slices = [x[:, i : i + 23 : 2, j : j + 19 : 2] for i in (0, 1) for j in (0, 1)]
    return sum(slices) / 4


def highway(x):
    transformed = nn.relu(nn.Conv(3, (3, 3))(x))
    gate = nn.sigmoid(nn.Conv(3, (1, 7))(x))
    return gate * transformed + (1 - gate) * x


def inception(x):
    pooled = nn.max_pool(x, (5, 3), padding="SAME")
    return jnp.concatenate([nn.Conv(2, (1, 1))(x), nn.Conv(3, (3, 5))(x), pooled], -1)


@pytest.mark.parametrize(
    "functions",
    [
        [nn.Conv(2, (3, 5), strides=(2, 1), kernel_dilation=(2, 3))],
        [nn.Conv(2, (4, 2), padding="VALID")],
        [nn.Conv(3, (3, 3), feature_group_count=3)],
        [lambda x: nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))],
        [lambda x: nn.avg_pool(x, (2, 4), strides=(2, 3))],
        [
            lambda x: jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, (1, 2, 3, 1), (1, 2, 1, 1),
                ((0, 0), (0, 0), (2, 2), (0, 0)), window_dilation=(1, 3, 2, 1),
            ),
        ],
        [
            nn.Conv(4, (3, 3)),
            lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)),
            nn.Conv(4, (3, 3), kernel_dilation=2),
        ],
        [lambda x: nn.Dense(5)(x[:, ::2, 1::3])],
        [lambda x: jnp.dot(x[:, ::2, ::2], jnp.ones((3, 4)))],
        [shifted_sum, nn.Conv(4, (3, 3))],
        [inception],
        [lambda x: jnp.pad(x, ((0, 0), (2, 0), (0, 1), (0, 0))), shifted_sum],
        [lambda x: x[:, 3:].reshape(len(x), 21, 20, 3, 1)[..., 0]],
    ],
    ids=[
        "strided-dilated-oblong", "unpadded-even", "depthwise", "max-pool", "avg-pool",
        "dilated-pool", "conv-pool-dilated-conv", "dense-on-slice", "dot-on-slice",
        "shifted-slices", "inception", "pad", "reshape",
    ],
)  # fmt: skip
def test_field_of_operations(functions):
    check_field(Net(tuple(functions)), (24, 20, 3), f"part{len(functions)}")


def test_field_of_a_highway_layer():
    # A product sees what its factors see; where they are zero it would not show.
    check_field(Net((highway,)), (24, 20, 3), "part1", base=1)


def convolve(x):
    return jax.lax.conv_general_dilated(
        x,
        jnp.ones((3, 3, 3, 3)),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def with_own_tangent(x, times):
    return convolve(x) * times


with_own_tangent.defjvp(lambda times, x, t: (convolve(*x) * times, convolve(*t)))


@jax.custom_vjp
def with_own_gradient(x):
    return convolve(x)


with_own_gradient.defvjp(lambda x: (convolve(x), None), lambda _, g: (convolve(g),))


def scanned(x, length=4):
    return jax.lax.scan(lambda x, _: (convolve(x), None), x, length=length)[0]


@pytest.mark.parametrize(
    ("function", "field", "first"),
    [
        (jax.jit(lambda x: jax.jit(convolve)(convolve(x))), (5, 5), (-2, -2)),
        (jax.checkpoint(convolve), (3, 3), (-1, -1)),
        (lambda x: with_own_tangent(x, 2), (3, 3), (-1, -1)),
        (with_own_gradient, (3, 3), (-1, -1)),
        (scanned, (9, 9), (-4, -4)),
        (jax.jit(lambda x: jax.checkpoint(scanned)(x)), (9, 9), (-4, -4)),
        (lambda x: jax.lax.scan(lambda x, _: (scanned(x), None), x, length=3)[0],
         (25, 25), (-12, -12)),
        (lambda x: jax.lax.fori_loop(0, 2, lambda _, x: convolve(x), x),
         (5, 5), (-2, -2)),
        (lambda x: jax.lax.cond(True, scanned, convolve, x), (9, 9), (-4, -4)),
    ],
    ids=["jit", "checkpoint", "custom-jvp", "custom-vjp", "scan", "scan-in-checkpoint",
         "scan-in-scan", "fori-loop", "cond"],
)  # fmt: skip
def test_field_inside_transformations(function, field, first):
    row = row_of(function)
    assert (row.receptive_field, row.first_pixel) == (field, first)
    assert row.stride == (1, 1)
    assert not row.global_context


def gated(x):
    """A convolution, then squeeze-and-excitation."""
    x = nn.Conv(4, (3, 3))(x)
    gate = nn.Dense(4)(nn.relu(nn.Dense(1)(x.mean((1, 2), keepdims=True))))
    return x * nn.sigmoid(gate)


def test_a_gate_on_the_whole_image_is_marked():
    row = row_of(gated)
    assert (row.receptive_field, row.global_context) == ((3, 3), True)
    row = row_of(gated, nn.Conv(4, (3, 3), strides=2))
    assert (row.receptive_field, row.global_context) == ((5, 5), True)
    row = row_of(gated, nn.Conv(4, (3, 3)), lambda x: x.mean((1, 2)))
    assert (row.receptive_field, row.global_context) == ((None, None), False)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean((1, 2)),
        lambda x: jax.nn.softmax(x.reshape(1, -1, 3), 1),
        lambda x: nn.Dense(5)(x.reshape(1, -1)),
        lambda x: jnp.sort(x, axis=1),  # stands for any operation without a rule
        lambda x: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: 2 * x, x),
        lambda x: jax.lax.cond(x.sum() > 0, lambda: jnp.ones(3), lambda: jnp.zeros(3)),
        lambda x: nn.max_pool(x, (24, 20)).reshape(1, 3),
        lambda x: jnp.einsum("nhwc,nhwd->ncd", x, x),
        lambda x: jax.lax.map(convolve, jnp.stack([x, x]))[1],
        lambda x: nn.ConvTranspose(4, (2, 2), (4, 4))(x),
        lambda x: x.transpose(0, 3, 1, 2),
        lambda x: jnp.concatenate([x, x], 1)[:, ::2, ::-1],
    ],
    ids=[
        "mean",
        "softmax",
        "dense",
        "sort",
        "while",
        "cond",
        "pool",
        "einsum",
        "map",
        "enlarged",
        "transposed",
        "joined",
    ],
)
def test_what_sees_the_whole_image(function):
    row = row_of(nn.Conv(3, (3, 3)), function)
    assert (row.receptive_field, row.stride) == ((None, None), (None, None))
    assert row.first_pixel == (None, None)


def test_a_field_that_is_whole_along_one_axis():
    row = row_of(nn.Conv(4, (3, 3)), lambda x: x.mean(2))
    assert row.receptive_field == (3, None)
    assert (row.stride, row.first_pixel) == ((1, None), (-1, None))
    assert row.output_shape == (24, 4)


def test_what_does_not_see_the_image():
    row = row_of(lambda x: jnp.ones((1, 4, 5)))
    assert (row.receptive_field, row.output_shape) == ((0, 0), (4, 5))


def grown(layers):
    """The field and the stride after (kernel, stride) pairs, by the recurrence."""
    field, jump = 1, 1
    for kernel, stride in layers:
        field, jump = field + (kernel - 1) * jump, jump * stride
    return field, jump


@pytest.mark.parametrize("version", ["v1", "v1.5"])
def test_field_of_resnet50_by_hand(version):
    layers = [(7, 2), (3, 2)]
    expected = {"stem": grown(layers), "stem/conv": grown(layers[:1])}
    for stage, size in enumerate((3, 4, 6, 3), start=1):
        for block in range(size):
            stride = 2 if stage > 1 and block == 0 else 1
            strides = (stride, 1, 1) if version == "v1" else (1, stride, 1)
            layers += zip((1, 3, 1), strides)
        expected[f"stage{stage}"] = grown(layers)
    assert expected["stem/conv"] == (7, 2)
    assert expected["stem"] == (11, 4)
    assert expected["stage4"] == ({"v1": 483, "v1.5": 427}[version], 32)
    rows = rows_of(create_model("resnet50", stride_version=version), (224, 224, 3), 2)
    for name, (field, stride) in expected.items():
        assert rows[name].receptive_field == (field, field)
        assert rows[name].stride == (stride, stride)
    assert rows["head"].receptive_field == (None, None)


# Sizes and costs


def test_stages_of_cifar_resnet20_by_hand():
    rows = summarize(create_model("cifar_resnet20"), (32, 32, 3))
    assert [row.name for row in rows] == ["stem", "stage1", "stage2", "stage3", "head"]
    assert [row.output_shape for row in rows] == [
        (32, 32, 16), (32, 32, 16), (16, 16, 32), (8, 8, 64), (10,)
    ]  # fmt: skip
    weights = {
        "stem": 9 * 3 * 16,
        "stage1": 9 * 6 * 16 * 16,
        "stage2": 9 * (16 * 32 + 5 * 32 * 32),
        "stage3": 9 * (32 * 64 + 5 * 64 * 64),
        "head": 64 * 10,
    }
    norms = {"stem": 2 * 16, "stage1": 12 * 16, "stage2": 12 * 32, "stage3": 12 * 64}
    pixels = {"stem": 32 * 32, "stage1": 32 * 32, "stage2": 16 * 16, "stage3": 8 * 8}
    for row in rows:
        assert row.multiply_adds == weights[row.name] * pixels.get(row.name, 1)
        assert row.parameters == weights[row.name] + norms.get(row.name, 10)


@pytest.mark.parametrize(
    ("name", "shortcut", "side"),
    [
        ("resnet18", "C", 64),
        ("resnet50", "B", 224),
        ("plain18", "none", 64),
        ("cifar_resnet20", "B", 32),
    ],
)
def test_rows_add_up(name, shortcut, side):
    model = create_model(name, shortcut=shortcut)
    shape = (side, side, 3)
    rows = summarize(model, shape, depth=3)
    top = [row for row in rows if row.is_top_level]
    assert sum(row.multiply_adds for row in top) == count_multiply_adds(model, shape)
    params = abstract_variables(model, shape)["params"]
    assert sum(row.parameters for row in top) == count_parameters(params)
    # And so does each module, which consists of those inside it.
    whole = [row for row in rows if row.name.count("/") < 2 and row.name != "head"]
    for row in whole:
        inside = [r for r in rows if r.name.rpartition("/")[0] == row.name]
        if inside:
            assert row.parameters == sum(r.parameters for r in inside)
            assert row.multiply_adds == sum(r.multiply_adds for r in inside)
    assert summarize(model, shape) == top


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Conv(4, (3, 3), name="conv")(x)
        return nn.relu(nn.BatchNorm(use_running_average=True)(y)) + x, None


class Looped(nn.Module):
    """A stem and seven equal layers, one after the other or as a loop."""

    scan: bool
    remat: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), strides=2, name="stem")(x)
        layer = nn.remat(Layer) if self.remat else Layer
        if self.scan:
            layers = nn.scan(
                layer,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=7,
            )
            return layers(name="layers")(x, None)[0]
        for index in range(7):
            x, _ = layer(name=f"layer{index}")(x, None)
        return x


@pytest.mark.parametrize("remat", [False, True])
def test_a_loop_of_layers(remat):
    loop = rows_of(Looped(scan=True, remat=remat), (32, 32, 3), depth=2)
    unrolled = list(rows_of(Looped(scan=False), (32, 32, 3)).values())[1:]
    row = loop["layers"]
    assert row.parameters == sum(each.parameters for each in unrolled)
    assert row.multiply_adds == sum(each.multiply_adds for each in unrolled)
    assert row.receptive_field == unrolled[-1].receptive_field == (31, 31)
    assert row.first_pixel == unrolled[-1].first_pixel
    assert row.output_shape == unrolled[-1].output_shape == (16, 16, 4)
    assert (row.repeats, loop["layers/conv"].repeats, loop["stem"].repeats) == (7, 7, 1)
    assert loop["layers/conv"].multiply_adds == row.multiply_adds


class Odd(nn.Module):
    """Parameters, products and layers where nets seldom have them."""

    def setup(self):
        self.holder = Part(lambda x: x)
        self.shared = nn.Conv(3, (3, 3))
        self.dropout = nn.Dropout(0.5)
        self.kernel = self.param("kernel", nn.initializers.ones, (3, 3))

    def __call__(self, x, train=False):
        x = self.dropout(self.shared(self.shared(x)), deterministic=True)
        return self.holder(x @ self.kernel)


def test_shared_layers_and_what_lies_outside_the_modules():
    rows = rows_of(Odd(), (8, 8, 3))
    assert list(rows) == ["shared", "holder", "other"]  # no dropout
    assert rows["shared"].multiply_adds == 2 * 64 * 9 * 3 * 3
    assert rows["shared"].parameters == 9 * 3 * 3 + 3
    assert rows["shared"].receptive_field == (5, 5)
    assert (rows["other"].parameters, rows["other"].multiply_adds) == (9, 64 * 9)
    assert rows["other"].output_shape is None


class Held(nn.Module):
    def setup(self):
        self.convs = [nn.Conv(4, (3, 3)), nn.Conv(4, (3, 3))]

    def __call__(self, x):
        raise NotImplementedError


class Holding(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        held = Held(name="held")
        for index in range(2):
            x = held.convs[index](x)
        return x


def test_a_module_that_only_holds_others():
    rows = rows_of(Holding(), (8, 8, 3), depth=2)
    assert list(rows) == ["held", "held/convs_0", "held/convs_1"]
    assert rows["held"].multiply_adds == 64 * 9 * 4 * (3 + 4)
    assert rows["held"].output_shape is None


def test_nothing_is_computed():
    # A kernel of 4 TB, were it made.
    row = row_of(
        lambda x: nn.Dense(10**6)(x.reshape(1, -1)), image_shape=(10, 10**5, 1)
    )
    assert row.multiply_adds == 10**12


def test_depth_is_positive():
    with pytest.raises(ValueError, match="at least 1"):
        summarize(create_model("cifar_resnet20"), (32, 32, 3), depth=0)


# Named nets and tables


def text_of(console, *summaries):
    console.print(render(*summaries))
    return console.file.getvalue()


def test_totals_of_a_named_net():
    summary = summarize_named("resnet34", shortcut="A")
    assert summary.image_shape == (224, 224, 3)
    # Table 1 gives 3.6 G.
    assert (summary.parameters, summary.multiply_adds) == (21_623_848, 3_644_493_824)
    smaller = summarize_named("resnet34", image_size=112, depth=2, num_classes=10)
    assert smaller.rows[-1].parameters == 512 * 10 + 10
    assert smaller.rows[0].output_shape == (28, 28, 64)
    assert smaller.parameters == 21_797_672 - 990 * 513


@pytest.mark.parametrize("side", [0, -3])
def test_images_without_pixels_are_refused(side):
    with pytest.raises(UserError, match="must be at least 1"):
        summarize_named("cifar_resnet20", image_size=side)


def test_table_of_one_net(console):
    summary = summarize_named("resnet18", stride_version="v1")
    lines = [line.split() for line in text_of(console, summary).splitlines()]
    assert lines[0][:6] == [
        "resnet18,",
        "stride",
        "version",
        "v1;",
        "images",
        "224x224x3;",
    ]
    assert ["stem", "56x56x64", "4", "11", "9,536", "118,013,952"] in lines
    assert ["stage4", "7x7x512", "32", "435", "8,393,728", "411,041,792"] in lines
    assert ["head", "1000", "all", "513,000", "512,000"] in lines
    assert ["total", "11,689,512", "1,814,073,344"] in lines


def test_table_of_two_nets(console):
    first = summarize_named("cifar_resnet20", depth=2)
    text = text_of(console, first, summarize_named("resnet18", depth=2))
    lines = [line.split() for line in text.splitlines()]
    names = [line[0] for line in lines if line and line[0][:5] in ("stage", "block")]
    assert names == [
        "stage1", "block1", "block2", "block3", "stage2", "block1", "block2", "block3",
        "stage3", "block1", "block2", "block3", "stage4", "block1", "block2",
    ]  # fmt: skip
    assert [
        "stage1", "32x32x16", "15", "14.0k", "14.2M", "56x56x64", "43", "148k", "462M"
    ] in lines  # fmt: skip
    assert ["total", "270k", "40.6M", "11.7M", "1.81G"] in lines
    ratios = (269_722 / 11_689_512, 40_551_040 / 1_814_073_344)
    assert (
        f"cifar_resnet20 has {ratios[0]:.4g} times the parameters of resnet18 and "
        f"{ratios[1]:.4g} times its multiply-adds"
    ) in " ".join(text.split())


def test_tables_fit_eighty_columns():
    console = rich.console.Console(file=io.StringIO(), width=80)
    deep = summarize_named("resnet50", depth=2)
    console.print(render(deep))
    console.print(render(deep, summarize_named("cifar_resnet20", depth=2)))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "14x14x1024" in text
    assert "4,089,184,256" in text
    assert "…" not in text


def test_the_note_on_gates(console):
    class Gated(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return Part(gated, name="stage1")(x)

    summary = summarize_named("cifar_resnet20")
    rows = tuple(summarize(Gated(), (32, 32, 3)))
    text = text_of(console, type(summary)("gated", {}, "", (32, 32, 3), rows))
    assert "3 + all" in text
    assert "through a mean over the map" in text
