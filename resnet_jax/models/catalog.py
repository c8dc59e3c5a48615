"""The named nets: one line each, with its source and its published size.

A bare ImageNet name is the net for which torchvision or timm publishes weights:
shortcut B and v1.5 striding. The paper's own variants have names too (``resnet34_a``,
``resnet50_v1``), or are one option away: ``create_model("resnet34", shortcut="A")``.
CIFAR nets use shortcut A, as in section 4.2.

Any depth of a CIFAR family may be named: see ``FAMILIES``.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Container, Iterable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.errors import UserError, nearest
from resnet_jax.models import shortcuts
from resnet_jax.models.attention import SqueezeExcite
from resnet_jax.models.blocks import STRIDE_VERSIONS, BasicBlock, BottleneckBlock
from resnet_jax.models.convolution import (
    ALGORITHMS,
    INITIALIZATIONS,
    STEM_ALGORITHMS,
)
from resnet_jax.models.factories import class_of
from resnet_jax.models.fused import ARITHMETICS, VARIANCES
from resnet_jax.models.highway import HighwayNet
from resnet_jax.models.mlp import HighwayMLP, PlainMLP
from resnet_jax.models.normalization import NORMALIZATIONS
from resnet_jax.models.resnet import CifarStem, DeepStem, ResNet, plan_strides
from resnet_jax.models.stages import OverlappingStage
from resnet_jax.models.vgg import VGG


@dataclasses.dataclass(frozen=True)
class Entry:
    """A named net.

    Attributes:
      net: the module, as published.
      image_size: side of the square images that it was published for.
      source: where it is defined.
      parameters: trainable numbers, counted from the definition.
      multiply_adds: of one image of ``image_size``, convolutions and classifier.
      channels: of those images.
    """

    net: nn.Module
    image_size: int
    source: str
    parameters: int | None = None
    multiply_adds: int | None = None
    channels: int = 3

    @property
    def num_classes(self) -> int:
        """Classes of the data set that it was published for."""
        return 1000 if self.image_size == 224 else 10


HE2015 = "He et al. 2015, Table 1"
HE2015_CIFAR = "He et al. 2015, section 4.2"
HE2016 = "He et al. 2016"
WIDE = "Zagoruyko & Komodakis 2016"
RESNEXT = "Xie et al. 2017"
RESNET_D = "He et al. 2019, timm"
TIMM = "timm, resnet.py"
SQUEEZE = "Hu et al. 2018, timm"
HIGHWAY = "Srivastava et al. 2015"
SIMONYAN = "Simonyan & Zisserman 2014"
OVERLAPPING = "not published: section 4.2 with other shortcuts"

BOTTLENECK_V1 = functools.partial(BottleneckBlock, stride_version="v1")
SE_BASIC = functools.partial(BasicBlock, squeeze_excite=SqueezeExcite)
SE_BOTTLENECK = functools.partial(BottleneckBlock, squeeze_excite=SqueezeExcite)
S_STEM: dict[str, Any] = {
    "shortcut": "B",
    "stem": functools.partial(DeepStem, inner=(64, 64)),
    "stem_width": 128,
}
T_STEM: dict[str, Any] = {"stem": functools.partial(DeepStem, inner=(24, 32))}
BARE = shortcuts.Projection(normalized=False)


def _imagenet(
    parameters: int,
    multiply_adds: int,
    stage_sizes: Sequence[int],
    block: Any = BottleneckBlock,
    shortcut: str | shortcuts.Shortcut = "B",
    source: str = HE2015,
    **fields: Any,
) -> Entry:
    if isinstance(shortcut, str):
        shortcut = shortcuts.BY_NAME[shortcut]
    net = ResNet(tuple(stage_sizes), block, shortcut, **fields)
    return Entry(net, 224, source, parameters, multiply_adds)


def _resnet_d(
    parameters: int,
    multiply_adds: int,
    stage_sizes: Sequence[int],
    block: Any = BottleneckBlock,
    shortcut: str = "pooled",
    stem: Any = DeepStem,
    **fields: Any,
) -> Entry:
    fields |= {"stem": stem, "source": RESNET_D}
    return _imagenet(parameters, multiply_adds, stage_sizes, block, shortcut, **fields)


def _preact_imagenet(
    parameters: int, multiply_adds: int, stage_sizes: Sequence[int]
) -> Entry:
    block, fields = BottleneckBlock, {"preactivation": True}
    return _imagenet(
        parameters, multiply_adds, stage_sizes, block, BARE, HE2016, **fields
    )


def _seresnet(
    parameters: int,
    multiply_adds: int,
    stage_sizes: Sequence[int],
    block: Any = SE_BOTTLENECK,
) -> Entry:
    return _imagenet(parameters, multiply_adds, stage_sizes, block, source=SQUEEZE)


def _resnext(groups: int, base_width: int, block: Any = BottleneckBlock) -> Any:
    return functools.partial(block, groups=groups, base_width=base_width)


def _cifar(
    parameters: int | None,
    multiply_adds: int | None,
    n: int,
    shortcut: str | shortcuts.Shortcut = "A",
    block: Any = BasicBlock,
    source: str = HE2015_CIFAR,
    **fields: Any,
) -> Entry:
    if isinstance(shortcut, str):
        shortcut = shortcuts.BY_NAME[shortcut]
    options: dict[str, Any] = {"width": 16, "stem": CifarStem, "num_classes": 10}
    net = ResNet((n, n, n), block, shortcut, **(options | fields))
    return Entry(net, 32, source, parameters, multiply_adds)


def _bottleneck(parameters: int | None, multiply_adds: int | None, n: int) -> Entry:
    return _cifar(parameters, multiply_adds, n, "B", BOTTLENECK_V1, HE2016)


def _preact(parameters: int | None, multiply_adds: int | None, n: int) -> Entry:
    return _cifar(parameters, multiply_adds, n, source=HE2016, preactivation=True)


def _preact_bottleneck(
    parameters: int | None, multiply_adds: int | None, n: int
) -> Entry:
    block, fields = BOTTLENECK_V1, {"preactivation": True}
    return _cifar(parameters, multiply_adds, n, BARE, block, HE2016, **fields)


def _wide(parameters: int | None, multiply_adds: int | None, n: int, k: int) -> Entry:
    fields: dict[str, Any] = {"width": 16 * k, "stem_width": 16, "preactivation": True}
    return _cifar(parameters, multiply_adds, n, BARE, BasicBlock, WIDE, **fields)


def _overlapping(n: int) -> Entry:
    stage = functools.partial(OverlappingStage, every=1, span=2)
    return _cifar(None, None, n, source=OVERLAPPING, stage=stage)


def _mnist(parameters: int, multiply_adds: int, net: PlainMLP) -> Entry:
    return Entry(net, 28, HIGHWAY, parameters, multiply_adds, channels=1)


def _highway(
    parameters: int, multiply_adds: int, widths: Sequence[int], highways: Sequence[int]
) -> Entry:
    net = HighwayNet(widths=tuple(widths), highway_layers=tuple(highways))
    return Entry(net, 32, HIGHWAY, parameters, multiply_adds)


def _vgg(
    parameters: int, multiply_adds: int, convs: Sequence[int], batch_norm: bool = False
) -> Entry:
    net = VGG(stage_convs=tuple(convs), batch_norm=batch_norm)
    return Entry(net, 224, SIMONYAN, parameters, multiply_adds)


_10, _14, _26 = (1, 1, 1, 1), (1, 1, 1, 1), (2, 2, 2, 2)
_18, _34, _50 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 6, 3)
_101, _152, _200 = (3, 4, 23, 3), (3, 8, 36, 3), (3, 24, 36, 3)

# fmt: off
CATALOG: dict[str, Entry] = {
    "resnet18": _imagenet(11_689_512, 1_814_073_344, _18, BasicBlock),
    "resnet34": _imagenet(21_797_672, 3_663_761_408, _34, BasicBlock),
    "resnet50": _imagenet(25_557_032, 4_089_184_256, _50),
    "resnet101": _imagenet(44_549_160, 7_801_405_440, _101),
    "resnet152": _imagenet(60_192_808, 11_513_626_624, _152),
    "resnet18_a": _imagenet(11_515_688, 1_794_805_760, _18, BasicBlock, "A"),
    "resnet18_c": _imagenet(12_043_816, 1_878_298_624, _18, BasicBlock, "C"),
    "resnet34_a": _imagenet(21_623_848, 3_644_493_824, _34, BasicBlock, "A"),
    "resnet34_c": _imagenet(22_716_840, 3_830_747_136, _34, BasicBlock, "C"),
    "resnet50_v1": _imagenet(25_557_032, 3_857_973_248, _50, BOTTLENECK_V1),
    "resnet101_v1": _imagenet(44_549_160, 7_570_194_432, _101, BOTTLENECK_V1),
    "resnet152_v1": _imagenet(60_192_808, 11_282_415_616, _152, BOTTLENECK_V1),
    "plain18": _imagenet(11_515_688, 1_794_805_760, _18, BasicBlock, "none"),
    "plain34": _imagenet(21_623_848, 3_644_493_824, _34, BasicBlock, "none"),
    "preact_resnet200": _preact_imagenet(64_666_152, 15_007_481_856, _200),
    "wide_resnet50_2": _imagenet(
        68_883_240, 11_398_021_120, _50, _resnext(1, 128), source=WIDE),
    "wide_resnet101_2": _imagenet(
        126_886_696, 22_753_050_624, _101, _resnext(1, 128), source=WIDE),
    "resnext50_32x4d": _imagenet(
        25_028_904, 4_230_479_872, _50, _resnext(32, 4), source=RESNEXT),
    "resnext101_32x4d": _imagenet(
        44_177_704, 7_969_996_800, _101, _resnext(32, 4), source=RESNEXT),
    "resnext101_32x8d": _imagenet(
        88_791_336, 16_414_015_488, _101, _resnext(32, 8), source=RESNEXT),
    "resnext101_64x4d": _imagenet(
        83_455_272, 15_460_270_080, _101, _resnext(64, 4), source=RESNEXT),
    "resnet26": _imagenet(15_995_176, 2_342_256_640, _26, source=TIMM),
    "resnet200": _imagenet(64_673_832, 15_007_481_856, _200, source=TIMM),
    "resnet50c": _resnet_d(25_576_264, 4_328_824_832, _50, shortcut="B"),
    "resnet101c": _resnet_d(44_568_392, 8_041_046_016, _101, shortcut="B"),
    "resnet152c": _resnet_d(60_212_040, 11_753_267_200, _152, shortcut="B"),
    "resnet18d": _resnet_d(11_708_744, 2_053_713_920, _18, BasicBlock),
    "resnet34d": _resnet_d(21_816_904, 3_903_401_984, _34, BasicBlock),
    "resnet26d": _resnet_d(16_014_408, 2_581_897_216, _26),
    "resnet50d": _resnet_d(25_576_264, 4_328_824_832, _50),
    "resnet101d": _resnet_d(44_568_392, 8_041_046_016, _101),
    "resnet152d": _resnet_d(60_212_040, 11_753_267_200, _152),
    "resnet200d": _resnet_d(64_693_064, 15_247_122_432, _200),
    "resnet50s": _resnet_d(25_680_808, 5_444_337_664, _50, **S_STEM),
    "resnet101s": _resnet_d(44_672_936, 9_156_558_848, _101, **S_STEM),
    "resnet152s": _resnet_d(60_316_584, 12_868_780_032, _152, **S_STEM),
    "resnet10t": _resnet_d(5_435_488, 1_097_259_008, _10, BasicBlock, **T_STEM),
    "resnet14t": _resnet_d(10_081_632, 1_676_822_528, _14, **T_STEM),
    "resnet26t": _resnet_d(16_011_872, 2_550_286_336, _26, **T_STEM),
    "resnet50t": _resnet_d(25_573_728, 4_297_213_952, _50, **T_STEM),
    "resnext50d_32x4d": _resnet_d(25_048_136, 4_470_120_448, _50, _resnext(32, 4)),
    "seresnet18": _seresnet(11_779_624, 1_814_161_408, _18, SE_BASIC),
    "seresnet34": _seresnet(21_960_416, 3_663_920_128, _34, SE_BASIC),
    "seresnet50": _seresnet(28_088_024, 4_091_699_200, _50),
    "seresnet101": _seresnet(49_326_872, 7_806_148_608, _101),
    "seresnet152": _seresnet(66_821_848, 11_520_204_800, _152),
    "seresnet152d": _resnet_d(66_841_080, 11_759_845_376, _152, SE_BOTTLENECK),
    "seresnext50_32x4d": _seresnet(
        27_559_896, 4_232_994_816, _50, _resnext(32, 4, SE_BOTTLENECK)),
    "seresnext101_32x4d": _seresnet(
        48_955_416, 7_974_739_968, _101, _resnext(32, 4, SE_BOTTLENECK)),
    "seresnext101_32x8d": _seresnet(
        93_569_048, 16_418_758_656, _101, _resnext(32, 8, SE_BOTTLENECK)),
    "vgg16": _vgg(138_357_544, 15_470_264_320, (2, 2, 3, 3, 3)),
    "vgg16_bn": _vgg(138_365_992, 15_470_264_320, (2, 2, 3, 3, 3), batch_norm=True),
    "vgg19": _vgg(143_667_240, 19_632_062_464, (2, 2, 4, 4, 4)),
    "vgg19_bn": _vgg(143_678_248, 19_632_062_464, (2, 2, 4, 4, 4), batch_norm=True),
    "cifar_resnet20": _cifar(269_722, 40_551_040, 3),
    "cifar_resnet32": _cifar(464_154, 68_862_592, 5),
    "cifar_resnet44": _cifar(658_586, 97_174_144, 7),
    "cifar_resnet56": _cifar(853_018, 125_485_696, 9),
    "cifar_resnet110": _cifar(1_727_962, 252_887_680, 18),
    "cifar_resnet1202": _cifar(19_421_274, 2_829_238_912, 200),
    "cifar_resnet20_b": _cifar(272_474, 40_813_184, 3, "B"),
    "cifar_resnet32_b": _cifar(466_906, 69_124_736, 5, "B"),
    "cifar_resnet44_b": _cifar(661_338, 97_436_288, 7, "B"),
    "cifar_resnet56_b": _cifar(855_770, 125_747_840, 9, "B"),
    "cifar_resnet110_b": _cifar(1_730_714, 253_149_824, 18, "B"),
    "cifar_resnet1202_b": _cifar(19_424_026, 2_829_501_056, 200, "B"),
    "cifar_resnet20_c": _cifar(283_962, 42_648_192, 3, "C"),
    "cifar_resnet32_c": _cifar(489_594, 72_532_608, 5, "C"),
    "cifar_resnet44_c": _cifar(695_226, 102_417_024, 7, "C"),
    "cifar_resnet56_c": _cifar(900_858, 132_301_440, 9, "C"),
    "cifar_resnet110_c": _cifar(1_826_202, 266_781_312, 18, "C"),
    "cifar_resnet1202_c": _cifar(20_538_714, 2_986_263_168, 200, "C"),
    "cifar_plain20": _cifar(269_722, 40_551_040, 3, "none"),
    "cifar_plain32": _cifar(464_154, 68_862_592, 5, "none"),
    "cifar_plain44": _cifar(658_586, 97_174_144, 7, "none"),
    "cifar_plain56": _cifar(853_018, 125_485_696, 9, "none"),
    "cifar_plain110": _cifar(1_727_962, 252_887_680, 18, "none"),
    "cifar_plain1202": _cifar(19_421_274, 2_829_238_912, 200, "none"),
    "cifar_resnet164": _bottleneck(1_704_154, 244_500_992, 18),
    "cifar_resnet1001": _bottleneck(10_328_602, 1_487_849_984, 111),
    "cifar_preact_resnet110": _preact(1_727_962, 252_887_680, 18),
    "cifar_preact_resnet164": _preact_bottleneck(1_703_258, 244_500_992, 18),
    "cifar_preact_resnet1001": _preact_bottleneck(10_327_706, 1_487_849_984, 111),
    "cifar_wide_resnet40_2": _wide(2_243_546, 327_599_360, 6, 2),
    "cifar_wide_resnet40_4": _wide(8_949_210, 1_298_582_016, 6, 4),
    "cifar_wide_resnet16_8": _wide(10_961_370, 1_548_145_664, 2, 8),
    "cifar_wide_resnet28_10": _wide(36_479_194, 5_243_328_768, 4, 10),
    "cifar_highway19": _highway(2_256_838, 330_826_728, (32, 80, 128), (4, 5, 5)),
    "cifar_highway32": _highway(1_255_270, 314_491_880, (32, 48, 64), (9, 9, 9)),
    "mnist_highway10": _mnist(85_660, 84_700, HighwayMLP(10)),
    "mnist_highway20": _mnist(136_660, 134_700, HighwayMLP(20)),
    "mnist_highway50": _mnist(289_660, 284_700, HighwayMLP(50)),
    "mnist_highway100": _mnist(544_660, 534_700, HighwayMLP(100)),
    "mnist_plain10": _mnist(102_463, 101_743, PlainMLP(10)),
    "mnist_plain20": _mnist(153_583, 152_153, PlainMLP(20)),
    "mnist_plain50": _mnist(306_943, 303_383, PlainMLP(50)),
    "mnist_plain100": _mnist(562_543, 555_433, PlainMLP(100)),
}
# fmt: on


FAMILIES = {
    "cifar_resnet<6n+2>[_b|_c]": "residual, basic blocks, shortcut A (or B, C)",
    "cifar_plain<6n+2>": "plain",
    "cifar_overlapping_resnet<6n+2>": "residual, overlapping shortcuts",
    "cifar_preact_resnet<6n+2>": "pre-activation, basic blocks",
    "cifar_bottleneck_resnet<9n+2>": "residual, bottlenecks",
    "cifar_preact_bottleneck_resnet<9n+2>": "pre-activation, bottlenecks",
    "cifar_wide_resnet<6N+4>_<k>": "wide, k times the channels",
}
"""Names that stand for a net of any depth, and what they build.

A residual or pre-activation name whose depth is 9n+2 and not 6n+2 means bottlenecks
too: ``cifar_preact_resnet1001``. Of the depths that are both, 164 is in the catalog as
published, with bottlenecks; the longer names say it for the others.
"""

_FAMILY = re.compile(
    r"cifar_(?P<kind>(?:preact_)?(?:bottleneck_)?resnet|overlapping_resnet|plain|wide_resnet)"
    r"(?P<depth>0|[1-9][0-9]*)(?:_(?P<suffix>b|c|[1-9][0-9]*))?"
)


def list_models() -> list[str]:
    """The names of the catalog; ``FAMILIES`` are valid for other depths too."""
    return list(CATALOG)


def catalog_entry(name: str) -> Entry:
    """The catalog's entry, or one made for a CIFAR net of another depth.

    Raises:
      UserError: no net has that name.
    """
    if name in CATALOG:
        return CATALOG[name]
    match = _FAMILY.fullmatch(name)
    entry = match and _family_entry(name, **match.groupdict())
    if entry:
        return entry
    close = difflib.get_close_matches(name, list_models(), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "`resnet-jax summary` lists all"
    raise UserError(f"unknown model {name!r}; {hint}")


def _family_entry(name: str, kind: str, depth: str, suffix: str | None) -> Entry | None:
    """A CIFAR net by its family, or None if the suffix is not one of the family's."""
    layers = int(depth)
    if kind == "wide_resnet":
        if suffix is None or not suffix.isdecimal():
            return None
        return _wide(None, None, _blocks(name, layers, 6, 4), int(suffix))
    if suffix is not None and (kind != "resnet" or suffix.isdecimal()):
        return None
    if kind == "resnet" and suffix is not None:
        return _cifar(None, None, _blocks(name, layers, 6, 2), suffix.upper())
    if kind == "plain":
        return _cifar(None, None, _blocks(name, layers, 6, 2), "none")
    if kind == "overlapping_resnet":
        return _overlapping(_blocks(name, layers, 6, 2))
    makers = {"resnet": (_cifar, _bottleneck), "preact": (_preact, _preact_bottleneck)}
    basic, bottleneck = makers["preact" if kind.startswith("preact") else "resnet"]
    if "bottleneck" in kind:
        return bottleneck(None, None, _blocks(name, layers, 9, 2))
    if layers % 6 != 2 and layers % 9 == 2 and layers > 2:
        return bottleneck(None, None, _blocks(name, layers, 9, 2))
    return basic(None, None, _blocks(name, layers, 6, 2))


def _blocks(name: str, depth: int, layers: int, others: int) -> int:
    """Blocks a stage of a net of ``depth`` layers; ``layers`` are three blocks'."""
    if depth > others and (depth - others) % layers == 0:
        return (depth - others) // layers
    examples = ", ".join(str(layers * n + others) for n in range(1, 5))
    raise UserError(
        f"model {name}: the depth of such a net is {layers}n+{others} "
        f"({examples}, ...), not {depth}"
    )


def create_model(
    name: str,
    *,
    num_classes: int | Literal["published"] | None = "published",
    shortcut: str | None = None,
    stride_version: str | None = None,
    block_convs: int | None = None,
    squeeze_excite: bool | None = None,
    zero_init_last: bool | None = None,
    stochastic_depth_rate: float | None = None,
    dropout_rate: float | None = None,
    gate_bias: float | None = None,
    normalization: str | None = None,
    initialization: str | None = None,
    output_stride: int | None = None,
    batch_norm_groups: int | None = None,
    batch_norm_momentum: float | None = None,
    batch_norm_epsilon: float | None = None,
    batch_norm_frozen: bool | Sequence[str] | None = None,
    norm_variance: str | None = None,
    norm_arithmetic: str | None = None,
    fused_norm: bool | None = None,
    stem_form: str | None = None,
    scan: bool | None = None,
    remat: bool | None = None,
    conv_algorithm: str | None = None,
    dtype: Any = jnp.float32,
) -> Any:
    """A Linen module by its name in the catalog.

    An option left at None is the net's own, as published.

    Args:
      name: one of ``list_models()``, for example "resnet50" or "cifar_resnet56", or a
        depth of ``FAMILIES``.
      num_classes: classes of the classifier; None for pooled features; "published"
        for those of the data set the net was published for.
      shortcut: a name of ``shortcuts.BY_NAME``: "A", "B", "C", "pooled" (ResNet-D) or
        "none"; "scaled", "scaled_both", "exclusive_gate", "shortcut_gate" or "dropout"
        (He et al. 2016, Table 1, where "C" is the 1x1 convolution).
      stride_version: where a bottleneck strides: "v1" (the paper) or "v1.5".
      block_convs: 3x3 convolutions of a basic block.
      squeeze_excite: whether the residual functions are gated by their channels' means.
      zero_init_last: whether a block's last normalisation starts with scale zero.
      stochastic_depth_rate: with which the last block is dropped in training.
      dropout_rate: of the net's own kind of dropout.
      gate_bias: the first bias of the gates of a highway net or gated shortcut.
      normalization: "batch", or "none" for a residual or plain net without; its
        convolutions have biases then.
      initialization: of the kernels, a name of ``INITIALIZATIONS``: "he" (fan-out),
        "he_fan_in", "xavier" or "normal_0.01". A residual or plain net's classifier
        keeps its own.
      output_stride: 8, 16 or 32 of an ImageNet net; below 32 the last stages dilate.
      batch_norm_groups: parts of the batch with statistics of their own.
      batch_norm_momentum: decay of the running statistics; torch's 0.1 is 0.9 here.
      batch_norm_epsilon: added to the variance.
      batch_norm_frozen: True, or the parts ("stem", "stage1") whose normalisation
        keeps its running statistics in training.
      norm_variance: how the batch's variance is computed: "two_pass", or "fast", which
        reads the map once and is wrong where the mean is large beside the deviation.
      norm_arithmetic: of normalised maps in training: "wide" (float32) or "narrow"
        (``dtype``, which rounds more); statistics are float32 in both.
      fused_norm: normalisation, addition and ReLU as one function with a gradient that
        keeps less; the same to rounding (``models.fused``).
      stem_form: how an ImageNet net's 7x7 convolution is computed: "conv",
        "space_to_depth" or "four_channels"; the same to rounding.
      scan: run equal blocks as one loop; None: where unrolling would take minutes to
        compile (``scans_by_default``).
      remat: compute a block's inside again for the gradient, to save memory.
      conv_algorithm: how convolutions are computed, see ``models.convolution``.
      dtype: dtype of convolutions and maps; parameters, statistics and logits are
        float32 always.

    Raises:
      UserError: an unknown name or option.
    """
    entry = catalog_entry(name)
    net: Any = entry.net
    if num_classes == "published":
        num_classes = entry.num_classes
    options = {
        "shortcut": _shortcut(shortcut),
        "stochastic_depth_rate": stochastic_depth_rate,
        "dropout_rate": dropout_rate,
        "gate_bias": gate_bias,
        "normalization": normalization,
        "initialization": initialization,
        "output_stride": output_stride,
        "batch_norm_groups": batch_norm_groups,
        "batch_norm_momentum": batch_norm_momentum,
        "batch_norm_epsilon": batch_norm_epsilon,
        "batch_norm_frozen": batch_norm_frozen,
        "norm_variance": norm_variance,
        "norm_arithmetic": norm_arithmetic,
        "fused_norm": fused_norm,
        "stem_form": stem_form,
        "scan": scan,
        "remat": remat,
        "conv_algorithm": conv_algorithm,
    }
    block_options = {
        "stride_version": stride_version,
        "block_convs": block_convs,
        "squeeze_excite": squeeze_excite,
        "zero_init_last": zero_init_last,
    }
    given = {key: value for key, value in options.items() if value is not None}
    given_block = {k: value for k, value in block_options.items() if value is not None}
    _check_values({"num_classes": num_classes} | given | given_block)
    _refuse_unnormalized(given | given_block)
    _refuse_narrow_fused(given)
    given = _as_fields(net, given)
    fields = _field_names(net)
    _refuse_unknown(name, given, fields)
    if isinstance(net, ResNet):
        _check_output_stride(net, output_stride)
        overlapping = class_of(net.stage) is OverlappingStage
        if overlapping:
            _refuse_overlapping(name, given | given_block)
        given["block"] = _with_options(name, net.block, given_block)
        if scan is None and not overlapping:
            given["scan"] = scans_by_default(sum(net.stage_sizes))
    else:
        _refuse_unknown(name, given_block, fields)
    return net.clone(num_classes=num_classes, dtype=dtype, **given)


def scans_by_default(blocks: int) -> bool:
    """Whether a net of so many blocks runs them as loops unless told otherwise.

    The time to compile an unrolled net grows faster than its depth: on a CPU 22 s for
    110 layers (54 blocks) and more than 120 s for 302 (150 blocks), against 9 s as a
    loop. A step of depth 110 takes about as long in a loop at batch 8, and 1.4 (with
    remat) to 2.5 times as long at batch 128 (benchmarks/results/deep_nets*.json; with
    convolutions as ``loop_algorithm`` says). Accelerators: not measured. The rule is
    one for all of them, since a run's checkpoints hold the tree that it chooses.
    """
    return blocks > 100


def _as_fields(net: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options by the names of the module's fields, where these differ."""
    fields = dict(options)
    if "initialization" in fields:
        fields["kernel_init"] = INITIALIZATIONS[fields.pop("initialization")]
    stem: Any = getattr(net, "stem", None)
    if "stem_form" in fields and "form" in _field_names(class_of(stem)):
        form = fields.pop("stem_form")
        fields["stem"] = stem if form == "conv" else functools.partial(stem, form=form)
    shortcut = fields.get("shortcut", getattr(net, "shortcut", None))
    if isinstance(shortcut, shortcuts.Gated) and "gate_bias" in fields:
        bias = fields.pop("gate_bias")
        fields["shortcut"] = dataclasses.replace(shortcut, bias=bias)
    return fields


_ACT_ON_NORMALIZATION = (
    "zero_init_last",
    "norm_variance",
    "norm_arithmetic",
    "fused_norm",
)


def _refuse_unnormalized(options: dict[str, Any]) -> None:
    """Raises UserError where what acts on normalisations is asked of a net of none."""
    if options.get("normalization") != "none":
        return
    for option, value in options.items():
        acts = option.startswith("batch_norm_") or option in _ACT_ON_NORMALIZATION
        if acts and value is not False:
            raise UserError(
                f"{option}={value} acts on batch normalisation, and normalization is "
                f"none: leave {option} out, or in a config at its default"
            )


def _refuse_narrow_fused(options: dict[str, Any]) -> None:
    """Raises UserError where the fused normalisation is asked to be narrow."""
    if options.get("fused_norm") and options.get("norm_arithmetic") == "narrow":
        raise UserError(
            "fused_norm computes in float32: leave out fused_norm, or norm_arithmetic"
        )


def _refuse_overlapping(name: str, options: dict[str, Any]) -> None:
    """Raises UserError for options of blocks: single layers have no inside."""
    of_blocks = ("scan", "remat", "stochastic_depth_rate", "dropout_rate")
    for option in (*of_blocks, "block_convs", "zero_init_last"):
        if options.get(option):
            raise UserError(f"model {name} has no option {option}")


def _with_options(name: str, block: Any, options: dict[str, Any]) -> Any:
    """The block with options of its own set; the same object where there are none."""
    names = {"block_convs": "num_convs"}
    values = {names.get(key, key): value for key, value in options.items()}
    if "squeeze_excite" in values:
        values["squeeze_excite"] = SqueezeExcite if values["squeeze_excite"] else None
    fields = _field_names(class_of(block))
    if "stride_version" not in fields:
        # A basic block has one convolution that can stride: both versions are it.
        values.pop("stride_version", None)
    _refuse_unknown(name, values, fields)
    return functools.partial(block, **values) if values else block


def _field_names(module: Any) -> set[str]:
    """The fields of a dataclass; none of what is no dataclass."""
    if not dataclasses.is_dataclass(module):
        return set()
    return {field.name for field in dataclasses.fields(module)}


def _refuse_unknown(name: str, options: Iterable[str], valid: Container[str]) -> None:
    for option in options:
        if option not in valid:
            names = {"num_convs": "block_convs", "kernel_init": "initialization"}
            option = names.get(option, option)
            raise UserError(f"model {name} has no option {option}")


def _shortcut(letter: str | None) -> shortcuts.Shortcut | None:
    if letter is None:
        return None
    if letter not in shortcuts.BY_NAME:
        raise UserError(
            f"unknown shortcut {letter!r}; {nearest(letter, shortcuts.BY_NAME)}"
        )
    return shortcuts.BY_NAME[letter]


def _check_output_stride(net: ResNet, output_stride: int | None) -> None:
    try:
        plan_strides(len(net.stage_sizes), class_of(net.stem).strides[1], output_stride)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_values(options: dict[str, Any]) -> None:
    """Raises UserError where an option's value can be none of its kind."""
    for option in ("num_classes", "batch_norm_groups", "block_convs"):
        value = options.get(option)
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, not {value}")
    for option in ("dropout_rate", "stochastic_depth_rate"):
        if not 0 <= options.get(option, 0) < 1:
            raise UserError(
                f"{option} must be at least 0 and below 1, not {options[option]}"
            )
    choices: dict[str, Iterable[str]] = {
        "stride_version": STRIDE_VERSIONS,
        "conv_algorithm": ALGORITHMS,
        "norm_variance": VARIANCES,
        "norm_arithmetic": ARITHMETICS,
        "stem_form": ("conv", *STEM_ALGORITHMS),
        "normalization": NORMALIZATIONS,
        "initialization": INITIALIZATIONS,
    }
    for option, valid in choices.items():
        if option in options and options[option] not in tuple(valid):
            raise UserError(
                f"unknown {option} {options[option]!r}; valid are {', '.join(valid)}"
            )
