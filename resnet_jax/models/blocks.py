"""Residual blocks: y = relu(F(x) + shortcut(x)), equations 1 and 2 of He et al. 2015.

``BasicBlock`` and ``BottleneckBlock`` are the blocks of the paper's Fig. 5: F applies
convolution, normalisation, ReLU. ``PreActBasicBlock`` and ``PreActBottleneckBlock`` are
the pre-activation blocks of He et al. 2016: F applies normalisation, ReLU, convolution,
and nothing follows the addition.
"""

from collections.abc import Callable
from typing import Literal

import jax
from flax import linen as nn

from resnet_jax.models.conv import Conv
from resnet_jax.models.factories import ModuleFactory
from resnet_jax.models.norm import norm_act
from resnet_jax.models.shortcuts import Projection, Shortcut
from resnet_jax.options import STRIDE_VERSIONS

Activation = Callable[[jax.Array], jax.Array]


class ResidualBlock(nn.Module):
    """The fields and helpers that all blocks share.

    A block maps (n, h, w, c) to (n, ceil(h / strides), ceil(w / strides), features
    times ``expansion``). Call it as ``block(x, drop_rate)``, where ``drop_rate`` is the
    probability with which ``stochastic_depth`` drops F(x).

    Attributes:
      features: channels of the block before any expansion.
      strides: stride of the block and of its shortcut.
      norm: factory of the normalisations, ``norm(name=...)``.
      shortcut: carries x to the addition, see ``models.shortcuts``.
      conv: factory of the convolutions.
      activation: follows each normalisation, and the addition.
      dilation: spacing of the taps up to and including the convolution that strides,
        and after it. They differ where dilation replaces a stride.
      squeeze_excite: factory of a gate on F(x).
      stochastic_depth: factory of a module ``(y, drop_rate)`` that drops F(x).
      position: "net" for the first block of a net, "stage" for the first block of
        another stage, "inner" for any other. Only pre-activation depends on it.
    """

    features: int
    strides: int
    norm: ModuleFactory
    shortcut: Shortcut = Projection()
    conv: ModuleFactory = Conv
    activation: Activation = nn.relu
    dilation: tuple[int, int] = (1, 1)
    squeeze_excite: ModuleFactory | None = None
    stochastic_depth: ModuleFactory | None = None
    position: Literal["net", "stage", "inner"] = "inner"

    preactivation = False
    expansion = 1

    def convolve(self, name: str, x: jax.Array, features: int, size: int, **options):
        """Convolves with a size x size kernel; options equal to 1 are left out."""
        options = {key: value for key, value in options.items() if value != 1}
        return self.conv(features, (size, size), name=name, **options)(x)

    def norm_relu(self, name: str, x: jax.Array) -> jax.Array:
        """relu(norm(x))."""
        return norm_act(self.norm(name=name), x, self.activation)

    def add(
        self,
        x: jax.Array,
        y: jax.Array,
        drop_rate: float | jax.Array,
        last: Callable[..., jax.Array] = lambda y: y,
        activation: Activation | None = None,
    ) -> jax.Array:
        """activation(F(x) + shortcut(x)), where F(x) = last(y).

        Squeeze-and-excitation, stochastic depth and gates act on F(x).
        """
        carried, gate = self.shortcut(
            x, y.shape[-1], self.strides, self.conv, self.norm, self.dilation
        )
        if self.squeeze_excite is not None:
            last = _then(last, self.squeeze_excite(name="squeeze_excite"))
        if self.stochastic_depth is not None:
            drop = self.stochastic_depth(name="stochastic_depth")
            last = _then(last, lambda y: drop(y, drop_rate))
        if gate is not None:
            last = _then(last, lambda y: gate * y)
        return norm_act(last, y, activation, carried)


class BasicBlock(ResidualBlock):
    """3x3 convolutions: two in the paper (Fig. 5 left).

    Attributes:
      num_convs: the number of convolutions; Zagoruyko & Komodakis 2016 compare 1 to 4.
      zero_init_last: start with a scale of zero in the last normalisation, so that
        F(x) = 0 (Goyal et al. 2017).
    """

    num_convs: int = 2
    zero_init_last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, drop_rate: float | jax.Array = 0.0) -> jax.Array:
        """relu(F(x) + shortcut(x)); see ``ResidualBlock``."""
        before, after = self.dilation
        y = self.convolve(
            "conv1", x, self.features, 3, strides=self.strides, dilation=before
        )
        for i in range(1, self.num_convs):
            y = self.norm_relu(f"norm{i}", y)
            y = self.convolve(f"conv{i + 1}", y, self.features, 3, dilation=after)
        norm = self.norm(name=f"norm{self.num_convs}", **_scale(self.zero_init_last))
        return self.add(x, y, drop_rate, norm, self.activation)


class BottleneckBlock(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions; the last is four times as wide (Fig. 5 right).

    Attributes:
      stride_version: "v1" strides the first 1x1, as the paper and its released models
        do; "v1.5" strides the 3x3, as torchvision does.
      groups: groups of the 3x3 (ResNeXt, Xie et al. 2017).
      base_width: channels of each group of the 3x3 in a stage of 64 features; 128 with
        one group doubles the bottleneck's width (wide_resnet50_2).
      zero_init_last: see ``BasicBlock``.
    """

    stride_version: str = "v1.5"
    groups: int = 1
    base_width: int = 64
    zero_init_last: bool = False
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, drop_rate: float | jax.Array = 0.0) -> jax.Array:
        """relu(F(x) + shortcut(x)); see ``ResidualBlock``."""
        width = _bottleneck_width(self)
        first, second, dilation = _bottleneck_strides(self)
        y = self.convolve("conv1", x, width, 1, strides=first)
        y = self.norm_relu("norm1", y)
        y = self.convolve(
            "conv2",
            y,
            width,
            3,
            strides=second,
            dilation=dilation,
            groups=self.groups,
        )
        y = self.norm_relu("norm2", y)
        y = self.convolve("conv3", y, self.features * self.expansion, 1)
        norm = self.norm(name="norm3", **_scale(self.zero_init_last))
        return self.add(x, y, drop_rate, norm, self.activation)


class PreActBasicBlock(ResidualBlock):
    """3x3 convolutions, each after its normalisation and ReLU (He et al. 2016).

    Attributes:
      num_convs: see ``BasicBlock``.
    """

    num_convs: int = 2
    preactivation = True

    @nn.compact
    def __call__(self, x: jax.Array, drop_rate: float | jax.Array = 0.0) -> jax.Array:
        """F(x) + shortcut(x); see ``ResidualBlock``."""
        before, after = self.dilation
        y, x = _preactivate(self, x)
        y = self.convolve(
            "conv1", y, self.features, 3, strides=self.strides, dilation=before
        )
        for i in range(2, self.num_convs + 1):
            y = self.norm_relu(f"norm{i}", y)
            y = self.convolve(f"conv{i}", y, self.features, 3, dilation=after)
        return self.add(x, y, drop_rate)


class PreActBottleneckBlock(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, each after its normalisation and ReLU.

    Attributes:
      stride_version, groups, base_width: see ``BottleneckBlock``.
    """

    stride_version: str = "v1.5"
    groups: int = 1
    base_width: int = 64
    expansion = 4
    preactivation = True

    @nn.compact
    def __call__(self, x: jax.Array, drop_rate: float | jax.Array = 0.0) -> jax.Array:
        """F(x) + shortcut(x); see ``ResidualBlock``."""
        width = _bottleneck_width(self)
        first, second, dilation = _bottleneck_strides(self)
        y, x = _preactivate(self, x)
        y = self.convolve("conv1", y, width, 1, strides=first)
        y = self.norm_relu("norm2", y)
        y = self.convolve(
            "conv2",
            y,
            width,
            3,
            strides=second,
            dilation=dilation,
            groups=self.groups,
        )
        y = self.norm_relu("norm3", y)
        y = self.convolve("conv3", y, self.features * self.expansion, 1)
        return self.add(x, y, drop_rate)


def _preactivate(block, x):
    """relu(norm1(x)), and the array that the shortcut starts from.

    The first block of a net receives an activated map; the shortcut of another stage's
    first block starts after the activation (He et al. 2016, appendix).
    """
    if block.position == "net":
        return x, x
    y = block.norm_relu("norm1", x)
    return y, y if block.position == "stage" else x


def _then(first, second):
    """The function second(first(y))."""
    return lambda y: second(first(y))


def _bottleneck_width(block):
    return block.features * block.base_width // 64 * block.groups


def _bottleneck_strides(block):
    """Strides of the first 1x1 and of the 3x3, and the dilation of the 3x3."""
    if block.stride_version not in STRIDE_VERSIONS:
        raise ValueError(
            f"stride_version is one of {', '.join(STRIDE_VERSIONS)}, "
            f"not {block.stride_version!r}"
        )
    if block.stride_version == "v1":
        return block.strides, 1, block.dilation[1]
    return 1, block.strides, block.dilation[0]


def _scale(starts_at_zero):
    return {"scale_init": nn.initializers.zeros} if starts_at_zero else {}
