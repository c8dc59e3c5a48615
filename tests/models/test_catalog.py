"""The named nets: their sizes counted by hand and as published, names, options."""

import inspect
import math
import pickle
import re
from copy import deepcopy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resnet_jax.analysis.complexity import count_multiply_adds
from resnet_jax.errors import UserError
from resnet_jax.models import (
    VGG,
    BasicBlock,
    BatchNorm,
    BottleneckBlock,
    HighwayNet,
    NoNorm,
    OverlappingStage,
    PreActBasicBlock,
    PreActBottleneckBlock,
    ResNet,
    SqueezeExcite,
    catalog_entry,
    create_model,
    list_models,
    shortcuts,
)
from resnet_jax.models.catalog import FAMILIES
from resnet_jax.models.conv import INITIALIZATIONS
from resnet_jax.models.create import scans_by_default
from resnet_jax.models.factories import class_of, option_of
from resnet_jax.options import ALGORITHMS, SHORTCUTS
from resnet_jax.options import INITIALIZATIONS as INITIALIZATION_NAMES

# Counting by hand: a k x k convolution from i to o channels in g groups has
# k * k * i * o / g weights, each of which is used once for every pixel of its output.


class Tally:
    """Parameters and multiply-adds of the layers told so far."""

    def __init__(self):
        self.weights = self.norms = self.multiply_adds = 0

    def conv(self, size, before, after, side, groups=1, bias=False, norm=True):
        weights = size * size * before * after // groups
        self.weights += weights + bias * after
        self.norms += norm * 2 * after
        self.multiply_adds += weights * side * side

    def norm(self, channels):
        self.norms += 2 * channels

    def dense(self, before, after):
        self.weights += before * after + after
        self.multiply_adds += before * after

    @property
    def parameters(self):
        return self.weights + self.norms


def residual(
    blocks,
    *,
    classes=1000,
    width=64,
    stem=(7, 64),
    bottleneck=False,
    strided=1,
    groups=1,
    group_width=64,
    shortcut="B",
    gated=False,
    preactivation=False,
):
    """A residual or plain net.

    ``stem`` is the size and the channels of one convolution, or the channels of three;
    ``strided`` is the number of the convolution that strides; ``group_width`` is that
    of a group of the 3x3 in the first stage.
    """
    tally = Tally()
    if classes == 10:
        side, channels = 32, stem[1]
        tally.conv(3, 3, channels, side)
    elif len(stem) == 3:
        side, channels = 56, stem[2]
        for before, after in ((3, stem[0]), stem[:2], stem[1:]):
            tally.conv(3, before, after, 112)
    else:
        side, channels = 56, stem[1]
        tally.conv(stem[0], 3, channels, 112)
    for stage, count in enumerate(blocks):
        features = width * 2**stage
        inner = features * group_width * groups // 64
        if bottleneck:
            layers = [(1, inner, 1), (3, inner, groups), (1, 4 * features, 1)]
        else:
            layers = [(3, features, 1), (3, features, 1)]
        for block in range(count):
            halves = stage > 0 and block == 0
            before, small = channels, side // 2 if halves else side
            for number, (size, after, parts) in enumerate(layers, start=1):
                side = small if number >= strided else side
                if preactivation and not (stage == block == 0 and number == 1):
                    tally.norm(channels)
                norm = not preactivation
                tally.conv(size, channels, after, side, parts, norm=norm)
                channels = after
            if gated:
                hidden = max(8, (channels // 16 + 4) // 8 * 8)
                tally.dense(channels, hidden)
                tally.dense(hidden, channels)
            changes = halves or before != channels
            if shortcut == "C" or (shortcut == "B" and changes):
                tally.conv(1, before, channels, side, norm=not preactivation)
    if preactivation:
        tally.norm(channels)
    tally.dense(channels, classes)
    return tally


def cifar(n, **options):
    options = {"classes": 10, "width": 16, "stem": (3, 16), "shortcut": "A"} | options
    return residual((n, n, n), **options)


def vgg(convs, norms):
    tally, channels, side = Tally(), 3, 224
    for count, features in zip(convs, (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            tally.conv(3, channels, features, side, bias=True, norm=norms)
            channels = features
        side //= 2
    for before, after in ((512 * 7 * 7, 4096), (4096, 4096), (4096, 1000)):
        tally.dense(before, after)
    return tally


def mlp(depth, width, gates):
    """Dense layers on 28x28 pixels; all but the first may have a gate, a second one."""
    tally = Tally()
    tally.dense(28 * 28, width)
    for _ in range((depth - 1) * (2 if gates else 1)):
        tally.dense(width, width)
    tally.dense(width, 10)
    return tally


def highway(widths, layers):
    tally, channels, side = Tally(), 3, 32
    for width, count in zip(widths, layers, strict=True):
        tally.conv(3, channels, width, side, bias=True, norm=False)
        for _ in range(2 * count):  # a transform and a gate
            tally.conv(3, width, width, side, bias=True, norm=False)
        channels, last = width, side
        side //= 2
    tally.conv(1, channels, 100, last, bias=True, norm=False)
    tally.dense(100, 10)
    return tally


BLOCKS = {
    10: (1, 1, 1, 1),
    14: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    26: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
DEEP = (32, 32, 64)
WIDER = (64, 64, 128)
TAPERED = (24, 32, 64)


def by_hand():
    """Every line of the catalog, from the papers' tables."""
    nets = {}

    def basic(name, depth, **options):
        nets[name] = residual(BLOCKS[depth], **options)

    def deep(name, depth, **options):
        options = {"bottleneck": True, "strided": 2} | options
        nets[name] = residual(BLOCKS[depth], **options)

    for depth in (18, 34):
        basic(f"resnet{depth}", depth)
        basic(f"resnet{depth}_a", depth, shortcut="A")
        basic(f"resnet{depth}_c", depth, shortcut="C")
        basic(f"plain{depth}", depth, shortcut="none")
        basic(f"resnet{depth}d", depth, stem=DEEP)
        basic(f"seresnet{depth}", depth, gated=True)
    for depth in (50, 101, 152):
        deep(f"resnet{depth}", depth)
        deep(f"resnet{depth}_v1", depth, strided=1)
        deep(f"resnet{depth}c", depth, stem=DEEP)
        deep(f"resnet{depth}d", depth, stem=DEEP)
        deep(f"resnet{depth}s", depth, stem=WIDER)
        deep(f"seresnet{depth}", depth, gated=True)
    for depth in (26, 200):
        deep(f"resnet{depth}", depth)
        deep(f"resnet{depth}d", depth, stem=DEEP)
    basic("resnet10t", 10, stem=TAPERED)
    for depth in (14, 26, 50):
        deep(f"resnet{depth}t", depth, stem=TAPERED)
    deep("preact_resnet200", 200, preactivation=True)
    deep("seresnet152d", 152, stem=DEEP, gated=True)
    for depth in (50, 101):
        deep(f"wide_resnet{depth}_2", depth, group_width=128)
    for name, groups, width, options in (
        ("resnext{}_32x4d", 32, 4, {}),
        ("resnext{}_32x8d", 32, 8, {}),
        ("resnext{}_64x4d", 64, 4, {}),
        ("resnext{}d_32x4d", 32, 4, {"stem": DEEP}),
        ("seresnext{}_32x4d", 32, 4, {"gated": True}),
        ("seresnext{}_32x8d", 32, 8, {"gated": True}),
    ):
        for depth in (50, 101):
            if name.format(depth) in list_models():
                deep(name.format(depth), depth, groups=groups, group_width=width,
                     **options)  # fmt: skip
    for convs, depth in (((2, 2, 3, 3, 3), 16), ((2, 2, 4, 4, 4), 19)):
        nets[f"vgg{depth}"] = vgg(convs, norms=False)
        nets[f"vgg{depth}_bn"] = vgg(convs, norms=True)
    for depth in (20, 32, 44, 56, 110, 1202):
        n = (depth - 2) // 6
        nets[f"cifar_resnet{depth}"] = nets[f"cifar_plain{depth}"] = cifar(n)
        nets[f"cifar_resnet{depth}_b"] = cifar(n, shortcut="B")
        nets[f"cifar_resnet{depth}_c"] = cifar(n, shortcut="C")
    nets["cifar_preact_resnet110"] = cifar(18, preactivation=True)
    for depth in (164, 1001):
        options = {"bottleneck": True, "shortcut": "B"}
        n = (depth - 2) // 9
        nets[f"cifar_resnet{depth}"] = cifar(n, **options)
        nets[f"cifar_preact_resnet{depth}"] = cifar(n, preactivation=True, **options)
    for depth, k in ((40, 2), (40, 4), (16, 8), (28, 10)):
        nets[f"cifar_wide_resnet{depth}_{k}"] = cifar(
            (depth - 4) // 6, width=16 * k, preactivation=True, shortcut="B"
        )
    nets["cifar_highway19"] = highway((32, 80, 128), (4, 5, 5))
    nets["cifar_highway32"] = highway((32, 48, 64), (9, 9, 9))
    for depth in (10, 20, 50, 100):
        nets[f"mnist_highway{depth}"] = mlp(depth, 50, gates=True)
        nets[f"mnist_plain{depth}"] = mlp(depth, 71, gates=False)
    return nets


BY_HAND = by_hand()
PUBLISHED_PARAMETERS = {
    # torchvision's and timm's tables, the number itself.
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet34_c": 22_716_840,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet200": 64_673_832,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    # The papers' tables, in millions to the digits that are printed.
    "cifar_resnet20": "0.27",
    "cifar_resnet32": "0.46",
    "cifar_resnet44": "0.66",
    "cifar_resnet56": "0.85",
    "cifar_resnet110": "1.7",
    "cifar_resnet1202": "19.4",
    "cifar_preact_resnet110": "1.7",
    "cifar_resnet164": "1.7",
    "cifar_preact_resnet164": "1.7",
    "cifar_wide_resnet40_2": "2.2",
    "cifar_wide_resnet40_4": "8.9",
    "cifar_wide_resnet16_8": "11.0",
    "cifar_wide_resnet28_10": "36.5",
    "cifar_highway19": "2.3",
}
PUBLISHED_GIGA_MULTIPLY_ADDS = {
    # Table 1 of the paper says 1.8, 3.6, 3.8, 7.6 and 11.3 x 10^9.
    "resnet18_a": "1.8",
    "resnet34_a": "3.6",
    "plain34": "3.6",
    "resnet34_c": "3.831",
    "resnet50_v1": "3.858",
    "resnet101_v1": "7.570",
    "resnet152_v1": "11.282",
    # torchvision's.
    "resnet18": "1.814",
    "resnet34": "3.664",
    "resnet50": "4.089",
    "resnet101": "7.801",
    "resnet152": "11.514",
    "wide_resnet50_2": "11.398",
    "wide_resnet101_2": "22.753",
    "resnext50_32x4d": "4.230",
    "resnext101_32x8d": "16.414",
    "resnext101_64x4d": "15.460",
    "vgg16": "15.470",
    "vgg19": "19.632",
}


def rounded(number, like):
    return f"{number:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("name", list_models())
def test_every_line_says_what_is_counted_by_hand(name):
    entry, count = catalog_entry(name), BY_HAND[name]
    assert entry.parameters == count.parameters
    assert entry.multiply_adds == count.multiply_adds


def test_the_catalog_is_what_is_counted():
    assert set(BY_HAND) == set(list_models())
    for name in list_models():
        entry = catalog_entry(name)
        assert entry.source
        kind = name.partition("_")[0]
        side, channels, classes = {"cifar": (32, 3, 10), "mnist": (28, 1, 10)}.get(
            kind, (224, 3, 1000)
        )
        assert (entry.image_size, entry.channels) == (side, channels)
        assert entry.num_classes == classes
        assert entry.net.num_classes == entry.num_classes


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_published_parameters(name):
    published = PUBLISHED_PARAMETERS[name]
    count = catalog_entry(name).parameters
    if isinstance(published, str):
        assert rounded(count / 1e6, published) == published
    else:
        assert count == published


def test_published_parameters_that_are_rounded_or_counted_in_another_way():
    # Zagoruyko & Komodakis print 36.5M; the authors' code counts this.
    assert catalog_entry("cifar_wide_resnet28_10").parameters == 36_479_194
    # Srivastava et al. print "1.25M" without the layout; ours is the nearest to it.
    highway32 = catalog_entry("cifar_highway32").parameters
    assert highway32 / 1e6 == pytest.approx(1.25, rel=0.005)
    # He et al. 2016 print 10.2M of 1001 layers: convolutions and classifier, without
    # the scales and biases of the normalisations, with which there are 10.33M.
    count = BY_HAND["cifar_preact_resnet1001"]
    assert rounded(count.weights / 1e6, "10.2") == "10.2"
    # 111 blocks a stage normalise 4c, c and c channels; the net's first block has no
    # first normalisation, and a stage's first block is narrower in it.
    channels = 111 * 6 * (16 + 32 + 64) - 4 * 16 - (128 - 64) - (256 - 128)
    channels += 16 + 4 * 64  # the stem's and the last
    assert count.norms == 2 * channels
    assert rounded(count.parameters / 1e6, "10.33") == "10.33"
    assert catalog_entry("cifar_preact_resnet1001").parameters == count.parameters


@pytest.mark.parametrize("name", PUBLISHED_GIGA_MULTIPLY_ADDS)
def test_published_multiply_adds(name):
    published = PUBLISHED_GIGA_MULTIPLY_ADDS[name]
    assert rounded(catalog_entry(name).multiply_adds / 1e9, published) == published


def test_closed_forms_of_section_4_2():
    """97,216 parameters and 6 equal convolutions for each further n."""
    for depth in (20, 32, 44, 56, 110, 1202):
        n = (depth - 2) // 6
        for name in (f"cifar_resnet{depth}", f"cifar_plain{depth}"):
            entry = catalog_entry(name)
            assert entry.parameters == 269_722 + (n - 3) * 97_216
            equal = 9 * 16 * 16 * 32**2
            firsts = 9 * 16 * 32 * 16**2 + 9 * 32 * 64 * 8**2
            stem, classifier = 9 * 3 * 16 * 32**2, 640
            expected = stem + (6 * n - 2) * equal + firsts + classifier
            assert entry.multiply_adds == expected
        extra = catalog_entry(f"cifar_resnet{depth}_b").parameters - entry.parameters
        assert extra == 16 * 32 + 64 + 32 * 64 + 128


# The modules behind the lines


def parameters(model, side, channels=3):
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


QUICK = [
    "resnet18_c",
    "resnet50_v1",
    "resnet14t",
    "resnext50_32x4d",
    "seresnet18",
    "vgg16_bn",
    "cifar_plain20",
    "cifar_preact_resnet1001",
    "cifar_wide_resnet16_8",
    "cifar_highway19",
    "mnist_highway10",
    "mnist_plain10",
]
"""One of each kind."""


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in list_models()
    ],
)
def test_the_net_is_as_large_as_its_line_says(name):
    entry = catalog_entry(name)
    model = create_model(name)
    if isinstance(model, ResNet):
        # Stacked blocks have the same parameters, and are traced once.
        model = model.clone(scan=True)
    assert parameters(model, entry.image_size, entry.channels) == entry.parameters
    shape = (entry.image_size, entry.image_size, entry.channels)
    assert count_multiply_adds(model, shape) == entry.multiply_adds


@pytest.mark.parametrize("name", ["resnet34", "cifar_resnet56"])
def test_an_unrolled_net_is_as_large_as_its_line_says(name):
    entry = catalog_entry(name)
    model = create_model(name, scan=False)
    assert parameters(model, entry.image_size) == entry.parameters


# The same names elsewhere


ELSEWHERE = [name for name in list_models() if not name.startswith(("cifar", "mnist"))]
QUICK_PEERS = ("resnet18", "resnet50", "resnext50_32x4d", "vgg16", "resnet14t")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK_PEERS else pytest.param(name, marks=pytest.mark.slow)
        for name in ELSEWHERE
    ],
)
def test_the_net_of_this_name_in_torchvision_and_timm(name, library):
    pytest.importorskip("torch", reason="torch is the reference of this test")
    from torch.utils.flop_counter import FlopCounterMode

    from tests.torch_peers import import_peer, torch

    if library == "torchvision":
        peer = import_peer("torchvision.models")
        found = peer.list_models()
        create = peer.get_model if name in found else None
    else:
        peer = import_peer("timm")
        found = peer.list_models()
        create = peer.create_model if name in found else None
    if create is None:
        pytest.skip(f"{library} has no {name}")
    with torch.device("meta"):
        net = create(name).eval()
        images = torch.empty(1, 3, 224, 224)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net(images)
    entry = catalog_entry(name)
    assert sum(p.numel() for p in net.parameters()) == entry.parameters
    assert counter.get_total_flops() == 2 * entry.multiply_adds


# Names of any depth


@pytest.mark.parametrize(
    ("name", "n", "block", "shortcut", "options"),
    [
        ("cifar_resnet8", 1, BasicBlock, "A", {}),
        ("cifar_resnet14_b", 2, BasicBlock, "B", {}),
        ("cifar_resnet26_c", 4, BasicBlock, "C", {}),
        ("cifar_resnet302", 50, BasicBlock, "A", {}),
        ("cifar_plain26", 4, BasicBlock, "none", {}),
        ("cifar_preact_resnet8", 1, BasicBlock, "A", {"preactivation": True}),
        # 9n+2 and not 6n+2: bottlenecks.
        ("cifar_resnet11", 1, "v1", "B", {}),
        ("cifar_resnet29", 3, "v1", "B", {}),
        ("cifar_preact_resnet29", 3, "v1", "bare", {"preactivation": True}),
        ("cifar_bottleneck_resnet29", 3, "v1", "B", {}),
        # Both: basic blocks, unless the name says otherwise.
        ("cifar_resnet20", 3, BasicBlock, "A", {}),
        ("cifar_resnet38", 6, BasicBlock, "A", {}),
        ("cifar_resnet110", 18, BasicBlock, "A", {}),
        ("cifar_preact_resnet20", 3, BasicBlock, "A", {"preactivation": True}),
        ("cifar_preact_resnet38", 6, BasicBlock, "A", {"preactivation": True}),
        ("cifar_preact_resnet110", 18, BasicBlock, "A", {"preactivation": True}),
        ("cifar_bottleneck_resnet20", 2, "v1", "B", {}),
        ("cifar_bottleneck_resnet38", 4, "v1", "B", {}),
        ("cifar_bottleneck_resnet110", 12, "v1", "B", {}),
        (
            "cifar_preact_bottleneck_resnet110",
            12,
            "v1",
            "bare",
            {"preactivation": True},
        ),
        # 164 is both too, and published with bottlenecks.
        ("cifar_resnet164", 18, "v1", "B", {}),
        ("cifar_preact_resnet164", 18, "v1", "bare", {"preactivation": True}),
        ("cifar_bottleneck_resnet164", 18, "v1", "B", {}),
        ("cifar_plain164", 27, BasicBlock, "none", {}),
        ("cifar_resnet164_b", 27, BasicBlock, "B", {}),
        (
            "cifar_wide_resnet22_3",
            3,
            BasicBlock,
            "bare",
            {"preactivation": True, "width": 48, "stem_width": 16},
        ),
        (
            "cifar_wide_resnet10_12",
            1,
            BasicBlock,
            "bare",
            {"preactivation": True, "width": 192, "stem_width": 16},
        ),
    ],
)
def test_names_of_any_depth(name, n, block, shortcut, options):
    model = create_model(name)
    assert model.stage_sizes == (n, n, n)
    preactivation = options.get("preactivation", False)
    if block == "v1":
        kind = PreActBottleneckBlock if preactivation else BottleneckBlock
        assert class_of(model.block) is kind
        assert model.block.keywords == {"stride_version": "v1"}
    else:
        assert model.block is (PreActBasicBlock if preactivation else block)
    bare = shortcuts.Projection(normalized=False)
    assert model.shortcut == {**shortcuts.BY_NAME, "bare": bare}[shortcut]
    defaults = {"preactivation": False, "width": 16, "stem_width": None}
    for field, value in (defaults | options).items():
        assert getattr(model, field) == value
    assert catalog_entry(name).image_size == 32
    assert model.num_classes == 10


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("cifar_bottleneck_resnet164", "cifar_resnet164"),
        ("cifar_preact_bottleneck_resnet1001", "cifar_preact_resnet1001"),
        ("cifar_resnet1001", "cifar_bottleneck_resnet1001"),
        ("cifar_resnet29", "cifar_bottleneck_resnet29"),
    ],
)
def test_two_names_of_one_net(name, same):
    assert create_model(name) == create_model(same)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cifar_resnet302", cifar(50)),
        ("cifar_resnet29", cifar(3, bottleneck=True, shortcut="B")),
        (
            "cifar_wide_resnet22_3",
            cifar(3, width=48, preactivation=True, shortcut="B"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_depths_are_as_large_as_counted_by_hand(name, count):
    assert catalog_entry(name).parameters is None  # nothing is claimed of them
    assert parameters(create_model(name, scan=True), 32) == count.parameters


@pytest.mark.parametrize("depth", [0, 1, 2, 7, 9, 21, 55, 57, 1201])
@pytest.mark.parametrize(
    "kind", ["resnet", "plain", "preact_resnet", "overlapping_resnet"]
)
def test_cifar_depths_that_are_not_6n_plus_2_are_refused(kind, depth):
    sentence = (
        rf"^model cifar_{kind}{depth}: the depth of such a net is 6n\+2 "
        rf"\(8, 14, 20, 26, \.\.\.\), not {depth}$"
    )
    with pytest.raises(UserError, match=sentence):
        create_model(f"cifar_{kind}{depth}")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cifar_resnet29_b", r"6n\+2 \(8, 14, 20, 26, \.\.\.\), not 29$"),
        ("cifar_plain29", r"6n\+2 .* not 29$"),
        ("cifar_bottleneck_resnet8", r"9n\+2 \(11, 20, 29, 38, \.\.\.\), not 8$"),
        ("cifar_bottleneck_resnet2", r"9n\+2 .* not 2$"),
        ("cifar_preact_bottleneck_resnet14", r"9n\+2 .* not 14$"),
        ("cifar_wide_resnet20_2", r"6n\+4 \(10, 16, 22, 28, \.\.\.\), not 20$"),
        ("cifar_wide_resnet4_2", r"6n\+4 .* not 4$"),
    ],
)
def test_depths_of_the_other_families(name, sentence):
    with pytest.raises(UserError, match=rf"^model {name}: .*{sentence}"):
        create_model(name)


@pytest.mark.parametrize(
    "name",
    [
        "cifar_wide_resnet28",
        "cifar_wide_resnet28_b",
        "cifar_wide_resnet28_0",
        "cifar_plain20_b",
        "cifar_resnet20_3",
        "cifar_resnet20_a",
        "cifar_resnet020",
        "cifar_preact_resnet20_c",
        "cifar_bottleneck_resnet20_b",
        "cifar_preact_plain20",
        "cifar_overlapping_resnet20_b",
        "cifar_preact_overlapping_resnet20",
        "mnist_highway11",
        "xcifar_resnet20",
        "cifar_resnet20 ",
    ],
)
def test_names_of_no_family_are_unknown(name):
    with pytest.raises(UserError, match=rf"^unknown model '{name}'; "):
        create_model(name)


@pytest.mark.parametrize("depth", [8, 20, 56, 110])
def test_overlapping_shortcuts_cost_nothing(depth):
    """At the parameters and multiply-adds of the ordinary net, counted by hand."""
    model = create_model(f"cifar_overlapping_resnet{depth}")
    assert class_of(model.stage) is OverlappingStage
    assert model.stage.keywords == {"every": 1, "span": 2}
    assert model.shortcut == shortcuts.ZeroPad()
    count = cifar((depth - 2) // 6)
    assert parameters(model, 32) == count.parameters
    if depth < 56:
        assert count_multiply_adds(model, (32, 32, 3)) == count.multiply_adds


def test_a_deep_overlapping_net_is_no_loop():
    assert not create_model("cifar_overlapping_resnet1202").scan


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("scan", True),
        ("remat", True),
        ("stochastic_depth_rate", 0.1),
        ("dropout_rate", 0.1),
        ("block_convs", 2),
        ("zero_init_last", True),
    ],
)
def test_overlapping_nets_have_no_options_of_blocks(option, value):
    name = "cifar_overlapping_resnet8"
    with pytest.raises(UserError, match=rf"^model {name} has no option {option}$"):
        create_model(name, **{option: value})


def kernels(model, group, side=32, channels=3):
    """Sizes of the kernels of a part of the net, in no order."""
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"][group]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sorted(leaf.shape for path, leaf in leaves if path[-1].key == "kernel")


@pytest.mark.parametrize("shortcut", ["A", "none"])
def test_blocks_of_one_two_and_three_convolutions_at_equal_depth(shortcut):
    """Six convolutions a stage, cut into blocks in three ways: one count of all."""
    count = cifar(3)
    for name, convs, blocks in (
        ("cifar_resnet38", 1, 6),
        ("cifar_resnet20", 2, 3),
        ("cifar_resnet14", 3, 2),
    ):
        model = create_model(name, block_convs=convs, shortcut=shortcut)
        assert model.stage_sizes == (blocks,) * 3
        for stage, (before, after) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            inner = [(3, 3, after, after)] * 5
            assert kernels(model, f"stage{stage}") == [(3, 3, before, after), *inner]
        assert parameters(model, 32) == count.parameters
        assert count_multiply_adds(model, (32, 32, 3)) == count.multiply_adds


@pytest.mark.parametrize(
    "name",
    [
        "cifar_plain20",
        "cifar_resnet20",
        "cifar_overlapping_resnet8",
        "cifar_highway19",
        "cifar_wide_resnet10_1",
        "mnist_highway10",
        "mnist_plain10",
    ],
)
@pytest.mark.parametrize("shape", [(28, 28, 1), (8, 8, 1), (13, 13, 3)])
def test_small_nets_take_images_of_any_size_and_channels(name, shape):
    model = create_model(name)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.eval_shape(model.apply, variables, images).shape == (2, 10)


def test_every_family_builds_what_it_says():
    for pattern in FAMILIES:
        # The smallest of each: n or N and k are 1.
        name = re.sub(
            r"<(\d)[nN]\+(\d)>", lambda m: str(int(m[1]) + int(m[2])), pattern
        )
        name = name.replace("[_b|_c]", "").replace("<k>", "1")
        assert create_model(name).stage_sizes == (1, 1, 1), pattern


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet-50", "resnet50"),
        ("resnt101", "resnet101"),
        ("ResNet18", "resnet18"),
        ("plain-34", "plain34"),
        ("cifar-resnet110", "cifar_resnet110"),
        ("cifar_resnet_56", "cifar_resnet56"),
        ("wide_resnet50", "wide_resnet50_2"),
        ("vgg-16", "vgg16"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, near):
    with pytest.raises(UserError, match=rf"{name}.*did you mean {near}\?"):
        create_model(name)


def test_a_name_near_to_none_is_refused_with_where_all_are():
    match = r"^unknown model 'zzz'; `resnet-jax summary` lists all$"
    with pytest.raises(UserError, match=match):
        create_model("zzz")


# Options


@pytest.mark.parametrize(
    ("name", "shortcut", "block", "num_classes"),
    [
        ("resnet18", shortcuts.Projection(), BasicBlock, 1000),
        ("resnet50", shortcuts.Projection(), BottleneckBlock, 1000),
        ("plain34", shortcuts.NoShortcut(), BasicBlock, 1000),
        ("resnet50d", shortcuts.Projection(pooled=True), BottleneckBlock, 1000),
        ("cifar_resnet20", shortcuts.ZeroPad(), BasicBlock, 10),
        ("cifar_plain20", shortcuts.NoShortcut(), BasicBlock, 10),
    ],
)
def test_defaults(name, shortcut, block, num_classes):
    model = create_model(name)
    assert model.shortcut == shortcut
    assert model.block is block
    assert model.num_classes == num_classes
    assert model.norm is BatchNorm
    norm = BatchNorm(use_running_average=False)
    assert (norm.momentum, norm.epsilon, norm.groups) == (0.9, 1e-5, 1)
    assert model.batch_norm_frozen is False
    assert model.dropout_rate == model.stochastic_depth_rate == 0
    assert model.output_stride is None
    assert (model.scan, model.remat) == (False, False)
    assert model.conv_algorithm == "auto"
    assert model.dtype == jnp.float32


def test_a_bare_name_strides_the_3x3_and_v1_the_1x1():
    assert BottleneckBlock(1, 1, None).stride_version == "v1.5"
    for depth in (50, 101, 152):
        assert create_model(f"resnet{depth}").block is BottleneckBlock
        v1 = create_model(f"resnet{depth}_v1").block
        assert v1.func is BottleneckBlock
        assert v1.keywords == {"stride_version": "v1"}
        option = create_model(f"resnet{depth}", stride_version="v1").block
        assert (option.func, option.keywords) == (v1.func, v1.keywords)


@pytest.mark.parametrize(
    ("letter", "shortcut"),
    [
        ("A", shortcuts.ZeroPad()),
        ("B", shortcuts.Projection(everywhere=False)),
        ("C", shortcuts.Projection(everywhere=True)),
        ("pooled", shortcuts.Projection(pooled=True)),
        ("none", shortcuts.NoShortcut()),
    ],
)
def test_shortcut_option(letter, shortcut):
    assert create_model("resnet34", shortcut=letter).shortcut == shortcut


def test_the_papers_variants_are_one_option_away():
    assert create_model("resnet34", shortcut="A") == create_model("resnet34_a")
    assert create_model("resnet18", shortcut="C") == create_model("resnet18_c")
    assert create_model("resnet34", shortcut="none") == create_model("plain34")
    assert create_model("cifar_resnet56", shortcut="B") == create_model(
        "cifar_resnet56_b"
    )


def test_num_classes_option():
    def output_shape(num_classes):
        model = create_model("resnet50", num_classes=num_classes)
        images = jax.ShapeDtypeStruct((3, 32, 32, 3), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        assert ("head" in shapes["params"]) == (num_classes is not None)
        return jax.eval_shape(model.apply, shapes, images).shape

    assert output_shape(7) == (3, 7)
    assert output_shape(None) == (3, 2048)
    assert create_model("cifar_highway19", num_classes=100).num_classes == 100
    assert create_model("vgg16", num_classes=None).num_classes is None
    assert create_model("resnet50", num_classes="published").num_classes == 1000
    assert create_model("cifar_resnet8", num_classes="published").num_classes == 10


BLOCK_OPTIONS = [
    ("resnet50", {"stride_version": "v1"}, {"stride_version": "v1"}),
    ("resnet50_v1", {"stride_version": "v1.5"}, {"stride_version": "v1.5"}),
    ("resnext50_32x4d", {"stride_version": "v1"}, {
        "stride_version": "v1", "groups": 32, "base_width": 4}),
    ("cifar_resnet20", {"block_convs": 3}, {"num_convs": 3}),
    ("resnet18", {"block_convs": 1, "zero_init_last": True}, {
        "num_convs": 1, "zero_init_last": True}),
    ("resnet50", {"squeeze_excite": True}, {"squeeze_excite": SqueezeExcite}),
    ("seresnet50", {"squeeze_excite": False}, {"squeeze_excite": None}),
    ("resnet101", {"zero_init_last": True}, {"zero_init_last": True}),
    ("cifar_resnet20", {"zero_init_last": False}, {"zero_init_last": False}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "keywords"), BLOCK_OPTIONS)
def test_options_of_the_blocks(name, options, keywords):
    block, published = create_model(name, **options).block, catalog_entry(name).net
    assert class_of(block) is class_of(published.block)
    assert block.keywords == keywords
    # All else is as published, and the catalog's own net is as it was.
    assert create_model(name, **options).clone(block=published.block) == published
    assert create_model(name) == published


def test_gated_nets_are_the_ordinary_ones_with_a_gate():
    gated = create_model("resnet50", squeeze_excite=True)
    assert parameters(gated, 32) == catalog_entry("seresnet50").parameters
    bare = create_model("seresnet50", squeeze_excite=False)
    assert parameters(bare, 32) == catalog_entry("resnet50").parameters


@pytest.mark.parametrize("version", ["v1", "v1.5"])
def test_a_basic_block_strides_the_same_in_both_versions(version):
    published = create_model("resnet18")
    assert create_model("resnet18", stride_version=version) == published


NET_OPTIONS = {
    "stochastic_depth_rate": ("resnet50", 0.2),
    "dropout_rate": ("cifar_wide_resnet28_10", 0.3),
    "gate_bias": ("cifar_highway19", -3.0),
    "output_stride": ("resnet50", 16),
    "batch_norm_frozen": ("resnet50", ("stem", "stage1")),
    "scan": ("resnet50", True),
    "remat": ("resnet50", True),
    "conv_algorithm": ("resnet50", "xla"),
    "dtype": ("vgg16", jnp.bfloat16),
}


@pytest.mark.parametrize("option", NET_OPTIONS)
def test_options_of_the_net(option):
    name, value = NET_OPTIONS[option]
    model = create_model(name, **{option: value})
    assert getattr(model, option) == value
    published = getattr(catalog_entry(name).net, option)
    assert published != value
    assert model.clone(**{option: published}) == catalog_entry(name).net
    # None is the net's own.
    if option != "dtype":
        assert create_model(name, **{option: None}) == catalog_entry(name).net


NORM_OPTIONS = {
    "batch_norm_groups": ("resnet50", 8, "groups"),
    "batch_norm_momentum": ("vgg16_bn", 0.99, "momentum"),
    "batch_norm_epsilon": ("resnet50", 1e-3, "epsilon"),
    "fused_norm": ("vgg16_bn", False, "fused"),
}


@pytest.mark.parametrize("option", NORM_OPTIONS)
def test_options_of_the_normalisation(option):
    name, value, field = NORM_OPTIONS[option]
    model, published = create_model(name, **{option: value}), catalog_entry(name).net
    assert option_of(model.norm, field) == value != option_of(published.norm, field)
    assert class_of(model.norm) is BatchNorm
    assert model.clone(norm=published.norm) == published
    assert create_model(name, **{option: None}) == published


def test_normalisation_is_an_option():
    published = catalog_entry("resnet50").net
    assert create_model("resnet50", normalization="none").norm is NoNorm
    assert create_model("resnet50", normalization="batch") == published


def test_every_option_has_its_test():
    tested = {"name", "num_classes", "shortcut", "initialization", *NET_OPTIONS}
    tested |= {"normalization", *NORM_OPTIONS}
    tested |= {option for _, options, _ in BLOCK_OPTIONS for option in options}
    assert set(inspect.signature(create_model).parameters) == tested


def test_names_by_pattern():
    assert list_models("wide*") == [n for n in list_models() if n.startswith("wide")]
    assert set(list_models("resnet?[04]")) == {"resnet34", "resnet50"}
    assert list_models("nothing") == []


def test_options_name_what_exists():
    """They are declared without jax, away from what they name."""
    assert tuple(shortcuts.BY_NAME) == SHORTCUTS
    assert tuple(INITIALIZATIONS) == INITIALIZATION_NAMES


@pytest.mark.parametrize("name", ["resnet50", "cifar_highway19", "mnist_plain10"])
@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_initialization_option(name, initialization):
    model = create_model(name, initialization=initialization)
    assert model.kernel_init is INITIALIZATIONS[initialization]
    published = catalog_entry(name).net
    assert model.clone(kernel_init=published.kernel_init) == published


def test_he_initialization_is_the_nets_own():
    assert create_model("resnet50", initialization="he") == create_model("resnet50")


@pytest.mark.parametrize(
    ("letter", "shortcut"),
    [
        ("exclusive_gate", shortcuts.Gated(exclusive=True, bias=-1.5)),
        ("shortcut_gate", shortcuts.Gated(exclusive=False, bias=-1.5)),
    ],
)
def test_gate_bias_of_a_gated_shortcut(letter, shortcut):
    model = create_model("cifar_resnet110", shortcut=letter, gate_bias=-1.5)
    assert model.shortcut == shortcut
    assert shortcuts.BY_NAME[letter].bias == -6


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_norm_groups", 2),
        ("batch_norm_momentum", 0.0),
        ("batch_norm_epsilon", 1e-3),
        ("batch_norm_frozen", ("stem",)),
        ("zero_init_last", True),
        ("fused_norm", True),
    ],
)
def test_without_normalisation_its_options_are_refused(option, value):
    sentence = rf"^{option}=.* acts on batch norm.* is none: leave {option} out, or"
    with pytest.raises(UserError, match=sentence):
        create_model("cifar_resnet20", normalization="none", **{option: value})
    assert create_model("cifar_resnet20", normalization="batch", **{option: value})


def test_other_kinds_of_net_take_the_options_they_have():
    assert isinstance(create_model("vgg16", dropout_rate=0.0), VGG)
    assert create_model("vgg16").dropout_rate == 0.5
    assert create_model("vgg16", dropout_rate=0.0).dropout_rate == 0
    highway = create_model("cifar_highway19", dropout_rate=0.2, gate_bias=-4.0)
    assert isinstance(highway, HighwayNet)
    assert (highway.dropout_rate, highway.gate_bias) == (0.2, -4.0)
    assert highway.highway_layers == (4, 5, 5)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("resnet50", "gate_bias", -1.0),
        ("resnet50", "block_convs", 3),
        ("cifar_resnet164", "block_convs", 3),
        ("vgg16", "shortcut", "A"),
        ("vgg16", "stride_version", "v1"),
        ("vgg16", "block_convs", 2),
        ("vgg16", "squeeze_excite", True),
        ("vgg16", "zero_init_last", True),
        ("vgg16_bn", "stochastic_depth_rate", 0.1),
        ("vgg16", "output_stride", 16),
        ("vgg16", "scan", True),
        ("vgg16", "remat", True),
        ("vgg16", "conv_algorithm", "xla"),
        ("vgg16", "fused_norm", True),
        ("cifar_preact_resnet20", "zero_init_last", True),
        ("vgg16", "gate_bias", -1.0),
        ("vgg16", "normalization", "none"),
        ("vgg16", "initialization", "he"),
        ("cifar_highway19", "normalization", "none"),
        ("mnist_plain10", "gate_bias", -1.0),
        ("mnist_highway10", "dropout_rate", 0.1),
        ("cifar_plain20", "gate_bias", -1.0),
        ("cifar_highway19", "shortcut", "none"),
        ("cifar_highway19", "stride_version", "v1"),
        ("cifar_highway19", "batch_norm_groups", 8),
        ("cifar_highway19", "batch_norm_momentum", 0.9),
        ("cifar_highway19", "batch_norm_epsilon", 1e-3),
    ],
)
def test_an_option_that_a_net_has_not_is_refused(name, option, value):
    with pytest.raises(UserError, match=rf"^model {name} has no option {option}$"):
        create_model(name, **{option: value})


@pytest.mark.parametrize(
    ("name", "option", "value", "sentence"),
    [
        (
            "resnet18",
            "shortcut",
            "D",
            r"^shortcut is one of A, B, C, pooled, none, scaled, scaled_both, "
            r"exclusive_gate, shortcut_gate, dropout, not 'D'",
        ),
        ("resnet18", "normalization", "group", r"is one of batch, none, not 'group'"),
        (
            "resnet18",
            "initialization",
            "lecun",
            r"is one of he, he_fan_in, xavier, normal_0\.01, not 'lecun'",
        ),
        ("resnet50", "shortcut", "pool", r"did you mean pooled\?$"),
        ("resnet50", "stride_version", "v2", r"is one of v1, v1\.5, not 'v2'"),
        ("resnet18", "stride_version", "v2", r"is one of v1, v1\.5, not 'v2'"),
        (
            "resnet50",
            "conv_algorithm",
            "fft",
            rf"is one of {', '.join(ALGORITHMS)}, not 'fft'$",
        ),
        (
            "resnet50",
            "num_classes",
            0,
            r"integer of at least 1, not 0$",
        ),
        (
            "vgg16",
            "num_classes",
            -3,
            r"integer of at least 1, not -3$",
        ),
        ("resnet50", "batch_norm_groups", 0, r"groups must be from 1 to .*, not 0$"),
        ("resnet18", "block_convs", 0, r"^block_convs must be from 1 to 64, not 0$"),
        (
            "resnet18",
            "dropout_rate",
            1.0,
            r"^dropout_rate .* 0 to 0\.999999, not 1\.0$",
        ),
        (
            "vgg16",
            "dropout_rate",
            -0.1,
            r"^dropout_rate must be from 0 to 0\.999999, not -0\.1$",
        ),
        ("resnet18", "stochastic_depth_rate", 1, r"^stochastic.* to 0\.999999, not 1"),
        ("resnet50", "output_stride", 12, r"is one of 4, 8, 16, 32, not 12$"),
        ("resnet50", "output_stride", 64, r"is one of 4, 8, 16, 32, not 64$"),
        ("cifar_resnet20", "output_stride", 8, r"is one of 1, 2, 4, not 8$"),
    ],
)
def test_values_that_are_none_of_an_options_are_refused(name, option, value, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model(name, **{option: value})


def test_deep_nets_run_as_loops_unless_told_otherwise():
    assert [scans_by_default(blocks) for blocks in (100, 101)] == [False, True]
    for name in ("cifar_resnet1202", "cifar_preact_resnet1001", "cifar_resnet302"):
        assert create_model(name).scan  # 600, 333 and 150 blocks
    assert not create_model("cifar_resnet1202", scan=False).scan
    assert not create_model("cifar_resnet164").scan
    assert not create_model("resnet152").scan


@pytest.mark.parametrize("again", [lambda m: pickle.loads(pickle.dumps(m)), deepcopy])
def test_every_net_pickles_and_copies(again):
    for name in [*list_models(), "cifar_overlapping_resnet8"]:
        model = create_model(name)
        assert repr(again(model)) == repr(model)


def test_a_pickled_net_with_options_computes_the_same():
    options = {"shortcut": "B", "batch_norm_groups": 2, "squeeze_excite": True}
    model = create_model("cifar_resnet8", initialization="he_fan_in", **options)
    copied = pickle.loads(pickle.dumps(model))
    images = jnp.ones((2, 32, 32, 3))
    for key in (jax.random.key(0), jax.random.key(1)):
        a, b = (jax.jit(net.init_with_output)(key, images) for net in (model, copied))
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_initialisers_draw_what_flax_draws():
    key, shape = jax.random.key(0), (3, 3, 8, 16)
    flax = nn.initializers
    pairs = {
        "he": flax.variance_scaling(2.0, "fan_out", "normal"),
        "he_fan_in": flax.variance_scaling(2.0, "fan_in", "normal"),
        "xavier": flax.xavier_uniform(),
        "normal_0.01": flax.normal(0.01),
    }
    for name, expected in pairs.items():
        found = INITIALIZATIONS[name](key, shape)
        np.testing.assert_array_equal(found, expected(key, shape))
