"""The named nets: one line each, with its source and its published size.

A bare ImageNet name is the net for which torchvision or timm publishes weights:
shortcut B and v1.5 striding. The paper's variants have names too (``resnet34_a``,
``resnet50_v1``). CIFAR nets use shortcut A, as in section 4.2, and exist at any depth:
see ``FAMILIES``.
"""

import dataclasses
import difflib
import fnmatch
import functools
import re
from collections.abc import Sequence
from typing import Any

from flax import linen as nn

from resnet_jax.errors import UserError
from resnet_jax.models import shortcuts
from resnet_jax.models.blocks import (
    BasicBlock,
    BottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
)
from resnet_jax.models.highway import HighwayNet
from resnet_jax.models.mlp import HighwayMLP, PlainMLP
from resnet_jax.models.resnet import CifarStem, DeepStem, ResNet
from resnet_jax.models.stages import OverlappingStage
from resnet_jax.models.vgg import VGG
from resnet_jax.models.wrappers import SqueezeExcite


@dataclasses.dataclass(frozen=True)
class Entry:
    """A named net.

    Attributes:
      net: the module, as published.
      image_size: side of the square images it was published for.
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
PREACT_V1 = functools.partial(PreActBottleneckBlock, stride_version="v1")
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
    stage_sizes: tuple[int, ...],
    block: Any = BottleneckBlock,
    shortcut: Any = "B",
    source: str = HE2015,
    **fields: Any,
) -> Entry:
    shortcut = shortcuts.BY_NAME.get(shortcut, shortcut)
    net = ResNet(stage_sizes, block, shortcut, **fields)
    return Entry(net, 224, source, parameters, multiply_adds)


def _cifar(
    parameters: int | None,
    multiply_adds: int | None,
    n: int,
    shortcut: Any = "A",
    block: Any = BasicBlock,
    source: str = HE2015_CIFAR,
    **fields: Any,
) -> Entry:
    shortcut = shortcuts.BY_NAME.get(shortcut, shortcut)
    options: dict[str, Any] = {"width": 16, "stem": CifarStem, "num_classes": 10}
    net = ResNet((n, n, n), block, shortcut, **(options | fields))
    return Entry(net, 32, source, parameters, multiply_adds)


def _wide(parameters: int | None, multiply_adds: int | None, n: int, k: int) -> Entry:
    block, fields = PreActBasicBlock, {"width": 16 * k, "stem_width": 16}
    return _cifar(parameters, multiply_adds, n, BARE, block, WIDE, **fields)


def _resnext(groups: int, base_width: int, block: Any = BottleneckBlock) -> Any:
    return functools.partial(block, groups=groups, base_width=base_width)


def _mnist(parameters: int, multiply_adds: int, net: PlainMLP) -> Entry:
    return Entry(net, 28, HIGHWAY, parameters, multiply_adds, channels=1)


def _highway(
    parameters: int, multiply_adds: int, widths: Sequence[int], highways: Sequence[int]
) -> Entry:
    net = HighwayNet(widths=widths, highway_layers=highways)
    return Entry(net, 32, HIGHWAY, parameters, multiply_adds)


def _vgg(
    parameters: int, multiply_adds: int, convs: Sequence[int], batch_norm: bool = False
) -> Entry:
    net = VGG(stage_convs=convs, batch_norm=batch_norm)
    return Entry(net, 224, SIMONYAN, parameters, multiply_adds)


_resnet_d = functools.partial(
    _imagenet, shortcut="pooled", source=RESNET_D, stem=DeepStem
)
_seresnet = functools.partial(_imagenet, source=SQUEEZE)
_bottleneck = functools.partial(
    _cifar, shortcut="B", block=BOTTLENECK_V1, source=HE2016
)
_preact = functools.partial(_cifar, block=PreActBasicBlock, source=HE2016)
_preact_bottleneck = functools.partial(
    _cifar, shortcut=BARE, block=PREACT_V1, source=HE2016
)
_overlapping = functools.partial(
    _cifar,
    source=OVERLAPPING,
    stage=functools.partial(OverlappingStage, every=1, span=2),
)

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
    "preact_resnet200": _imagenet(
        64_666_152, 15_007_481_856, _200, PreActBottleneckBlock, BARE, HE2016),
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
    "seresnet50": _seresnet(28_088_024, 4_091_699_200, _50, SE_BOTTLENECK),
    "seresnet101": _seresnet(49_326_872, 7_806_148_608, _101, SE_BOTTLENECK),
    "seresnet152": _seresnet(66_821_848, 11_520_204_800, _152, SE_BOTTLENECK),
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
"""Names of nets of any depth, and their meaning.

A residual or pre-activation depth of the form 9n+2 but not 6n+2 also means bottlenecks:
``cifar_preact_resnet1001``. Of the depths with both forms, 164 is the published net
with bottlenecks; use the longer names for other depths.
"""

_FAMILY = re.compile(r"cifar_([a-z_]+)(0|[1-9][0-9]{0,3})(?:_(b|c|[1-9][0-9]{0,2}))?")

_MAKERS: dict[tuple[str, int], Any] = {
    ("resnet", 6): _cifar,
    ("resnet", 9): _bottleneck,
    ("resnet_b", 6): functools.partial(_cifar, shortcut="B"),
    ("resnet_c", 6): functools.partial(_cifar, shortcut="C"),
    ("plain", 6): functools.partial(_cifar, shortcut="none"),
    ("overlapping_resnet", 6): _overlapping,
    ("preact_resnet", 6): _preact,
    ("preact_resnet", 9): _preact_bottleneck,
    ("bottleneck_resnet", 9): _bottleneck,
    ("preact_bottleneck_resnet", 9): _preact_bottleneck,
}
"""By kind, and the layers of three blocks: 6 of basic ones, 9 of bottlenecks."""


def list_models(pattern: str = "*") -> list[str]:
    """The names of the catalog that match a pattern, such as ``"wide*"``.

    ``FAMILIES`` are valid for other depths too.
    """
    return fnmatch.filter(CATALOG, pattern)


def catalog_entry(name: str) -> Entry:
    """The catalog's entry, or a new one for a CIFAR net of another depth.

    Raises:
      UserError: no net has that name.
    """
    if name in CATALOG:
        return CATALOG[name]
    entry = _family_entry(name)
    if entry:
        return entry
    close = difflib.get_close_matches(name, list_models(), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "`resnet-jax summary` lists all"
    raise UserError(f"unknown model {name!r}; {hint}")


def _family_entry(name: str) -> Entry | None:
    """A CIFAR net by its family, or None if no family has the name."""
    match = _FAMILY.fullmatch(name)
    if match is None:
        return None
    kind, depth, suffix = match[1], int(match[2]), match[3]
    if kind == "wide_resnet" and suffix and suffix.isdecimal():
        return _wide(None, None, _blocks(name, depth, 6, 4), int(suffix))
    kind = f"{kind}_{suffix}" if suffix else kind
    forms = [layers for known, layers in _MAKERS if known == kind]
    if not forms:
        return None
    valid = (layers for layers in forms if depth > 2 and depth % layers == 2)
    layers = next(valid, forms[0])
    return _MAKERS[kind, layers](None, None, _blocks(name, depth, layers, 2))


def _blocks(name: str, depth: int, layers: int, others: int) -> int:
    """Blocks per stage at this depth, where three blocks have ``layers`` layers."""
    if depth > others and (depth - others) % layers == 0:
        return (depth - others) // layers
    examples = ", ".join(str(layers * n + others) for n in range(1, 5))
    raise UserError(
        f"model {name}: the depth of such a net is {layers}n+{others} "
        f"({examples}, ...), not {depth}"
    )
