"""The named nets: one line each, with its source and its published size.

A bare ImageNet name is the net for which torchvision publishes weights: shortcut B and
v1.5 striding. The paper's own variants are one option away, for example
``create_model("resnet34", shortcut="A")`` or
``create_model("resnet50", stride_version="v1")``. CIFAR nets use shortcut A, as in
section 4.2, and any depth 6n+2 may be named.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from resnet_jax.errors import UserError, nearest
from resnet_jax.models import shortcuts
from resnet_jax.models.blocks import STRIDE_VERSIONS, BasicBlock, BottleneckBlock
from resnet_jax.models.resnet import CifarStem, ImageNetStem, ResNet


@dataclasses.dataclass(frozen=True)
class Entry:
    """A named net.

    Attributes:
      build: makes the module from ResNet's keyword arguments.
      image_size: side of the square images that it was published for.
      shortcut: name of its shortcut, a key of ``shortcuts.BY_NAME``.
      parameters: trainable numbers, counted from the definition.
      multiply_adds: of one image of ``image_size``, convolutions and classifier.
      source: where it is defined.
    """

    build: Callable[..., ResNet]
    image_size: int
    shortcut: str
    parameters: int | None = None
    multiply_adds: int | None = None
    source: str = ""

    @property
    def num_classes(self) -> int:
        """Classes of the data set that it was published for."""
        return 10 if self.image_size == 32 else 1000


def _imagenet(
    stage_sizes: Sequence[int],
    block: Any,
    parameters: int,
    multiply_adds: int,
    shortcut: str = "B",
) -> Entry:
    build = functools.partial(
        ResNet, stage_sizes=tuple(stage_sizes), block=block, stem=ImageNetStem
    )
    source = "He et al. 2015, section 3.3 and Table 1"
    return Entry(build, 224, shortcut, parameters, multiply_adds, source)


def _cifar(
    n: int,
    parameters: int | None = None,
    multiply_adds: int | None = None,
    shortcut: str = "A",
) -> Entry:
    build = functools.partial(
        ResNet, stage_sizes=(n, n, n), block=BasicBlock, stem=CifarStem, width=16
    )
    source = "He et al. 2015, section 4.2 and Table 6"
    return Entry(build, 32, shortcut, parameters, multiply_adds, source)


# fmt: off
CATALOG: dict[str, Entry] = {
    "resnet18": _imagenet((2, 2, 2, 2), BasicBlock, 11_689_512, 1_814_073_344),
    "resnet34": _imagenet((3, 4, 6, 3), BasicBlock, 21_797_672, 3_663_761_408),
    "resnet50": _imagenet((3, 4, 6, 3), BottleneckBlock, 25_557_032, 4_089_184_256),
    "resnet101": _imagenet((3, 4, 23, 3), BottleneckBlock, 44_549_160, 7_801_405_440),
    "resnet152": _imagenet((3, 8, 36, 3), BottleneckBlock, 60_192_808, 11_513_626_624),
    "plain18": _imagenet((2, 2, 2, 2), BasicBlock, 11_515_688, 1_794_805_760, "none"),
    "plain34": _imagenet((3, 4, 6, 3), BasicBlock, 21_623_848, 3_644_493_824, "none"),
    "cifar_resnet20": _cifar(3, 269_722, 40_551_040),
    "cifar_resnet32": _cifar(5, 464_154, 68_862_592),
    "cifar_resnet44": _cifar(7, 658_586, 97_174_144),
    "cifar_resnet56": _cifar(9, 853_018, 125_485_696),
    "cifar_resnet110": _cifar(18, 1_727_962, 252_887_680),
    "cifar_resnet1202": _cifar(200, 19_421_274, 2_829_238_912),
    "cifar_plain20": _cifar(3, 269_722, 40_551_040, shortcut="none"),
    "cifar_plain32": _cifar(5, 464_154, 68_862_592, shortcut="none"),
    "cifar_plain44": _cifar(7, 658_586, 97_174_144, shortcut="none"),
    "cifar_plain56": _cifar(9, 853_018, 125_485_696, shortcut="none"),
    "cifar_plain110": _cifar(18, 1_727_962, 252_887_680, shortcut="none"),
}
# fmt: on


def list_models() -> list[str]:
    """The names of the catalog.

    ``cifar_resnet<6n+2>`` and ``cifar_plain<6n+2>`` are valid for other depths too.
    """
    return list(CATALOG)


def catalog_entry(name: str) -> Entry:
    """The catalog's entry, or one made for a CIFAR net of another depth.

    Raises:
      UserError: no net has that name.
    """
    if name in CATALOG:
        return CATALOG[name]
    match = re.fullmatch(r"cifar_(resnet|plain)(0|[1-9][0-9]*)", name)
    if match:
        depth = int(match[2])
        if depth >= 8 and depth % 6 == 2:
            return _cifar(
                (depth - 2) // 6, shortcut="A" if match[1] == "resnet" else "none"
            )
        raise UserError(
            f"model {name}: a CIFAR net's depth is 6n+2 (8, 14, 20, 26, ...), "
            f"not {depth}"
        )
    raise UserError(f"unknown model {name!r}; {nearest(name, list_models())}")


def create_model(
    name: str,
    *,
    num_classes: int | Literal["published"] | None = "published",
    shortcut: str | None = None,
    stride_version: str = "v1.5",
    batch_norm_groups: int = 1,
    batch_norm_momentum: float = 0.9,
    batch_norm_epsilon: float = 1e-5,
    dtype: Any = jnp.float32,
) -> ResNet:
    """A Linen module by its name in the catalog.

    Args:
      name: one of ``list_models()``, for example "resnet50" or "cifar_resnet56".
      num_classes: classes of the classifier; None for pooled features; "published"
        for those of the data set the net was published for.
      shortcut: "A", "B", "C" or "none"; by default the net's own.
      stride_version: where a bottleneck strides: "v1" (the paper) or "v1.5".
      batch_norm_groups: parts of the batch with statistics of their own.
      batch_norm_momentum: decay of the running statistics; torch's 0.1 is 0.9 here.
      batch_norm_epsilon: added to the variance.
      dtype: dtype of convolutions and maps; parameters, statistics and logits are
        float32 always.

    Raises:
      UserError: an unknown name or option.
    """
    entry = catalog_entry(name)
    shortcut = entry.shortcut if shortcut is None else shortcut
    if shortcut not in shortcuts.BY_NAME:
        raise UserError(
            f"unknown shortcut {shortcut!r}; {nearest(shortcut, shortcuts.BY_NAME)}"
        )
    if stride_version not in STRIDE_VERSIONS:
        raise UserError(
            f"unknown stride_version {stride_version!r}; "
            f"valid are {', '.join(STRIDE_VERSIONS)}"
        )
    if num_classes == "published":
        num_classes = entry.num_classes
    for option, value in (
        ("num_classes", num_classes),
        ("batch_norm_groups", batch_norm_groups),
    ):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, not {value}")
    return entry.build(
        shortcut=shortcuts.BY_NAME[shortcut],
        num_classes=num_classes,
        stride_version=stride_version,
        batch_norm_groups=batch_norm_groups,
        batch_norm_momentum=batch_norm_momentum,
        batch_norm_epsilon=batch_norm_epsilon,
        dtype=dtype,
    )
