"""Residual blocks: y = relu(F(x) + shortcut(x)), equations 1 and 2 of He et al. 2015.

``BasicBlock`` and ``BottleneckBlock`` are the blocks of the paper's Fig. 5: F applies
convolution, normalisation, ReLU. ``PreActBasicBlock`` and ``PreActBottleneckBlock`` are
the pre-activation blocks of He et al. 2016: F applies normalisation, ReLU, convolution,
and nothing follows the addition.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from flax import linen as nn

from resnet_jax.models.conv import Conv
from resnet_jax.models.factories import ModuleFactory
from resnet_jax.models.norm import norm_act
from resnet_jax.models.shortcuts import Projection, Shortcut

STRIDE_VERSIONS = ("v1", "v1.5")

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

    def convolutions(self) -> Sequence[Callable[[jax.Array], jax.Array]]:
        """The convolutions of F, in order."""
        raise NotImplementedError

    def convolution(self, name: str, features: int, size: int, **options: int) -> Any:
        """A size x size convolution; options equal to 1 are left out."""
        options = {key: value for key, value in options.items() if value != 1}
        return self.conv(features, (size, size), name=name, **options)

    def norm_relu(self, name: str, x: jax.Array) -> jax.Array:
        """relu(norm(x))."""
        return norm_act(self.norm(name=name), x, self.activation)

    def paths(
        self,
        x: jax.Array,
        drop_rate: float | jax.Array,
        norm: Callable[[jax.Array], jax.Array] = lambda y: y,
    ) -> tuple[Callable[[jax.Array], jax.Array], jax.Array | None]:
        """Returns what follows the last convolution of F, as a function; shortcut(x).

        The last normalisation follows, and the rare parts that act on F(x):
        squeeze-and-excitation, stochastic depth and the shortcut's gate.
        """
        width = self.features * self.expansion
        shortcut, gate = self.shortcut(
            x, width, self.strides, self.conv, self.norm, self.dilation
        )
        end = norm
        if self.squeeze_excite is not None:
            end = _then(end, self.squeeze_excite(name="squeeze_excite"))
        if self.stochastic_depth is not None:
            drop = self.stochastic_depth(name="stochastic_depth")
            end = _then(end, lambda y: drop(y, drop_rate))
        if gate is not None:
            end = _then(end, lambda y: gate * y)
        return end, shortcut


def _then(first, second):
    """The function second(first(y))."""
    return lambda y: second(first(y))


class PostActivationBlock(ResidualBlock):
    """Normalises after each convolution of F, as in He et al. 2015.

    Attributes:
      zero_init_last: start with a scale of zero in the last normalisation, so that
        F(x) = 0 (Goyal et al. 2017).
    """

    zero_init_last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, drop_rate: float | jax.Array = 0.0) -> jax.Array:
        """relu(F(x) + shortcut(x)); see ``ResidualBlock``."""
        first, *others = self.convolutions()
        y = first(x)
        for i, conv in enumerate(others, start=1):
            y = conv(self.norm_relu(f"norm{i}", y))
        scale = {"scale_init": nn.initializers.zeros} if self.zero_init_last else {}
        norm = self.norm(name=f"norm{len(others) + 1}", **scale)
        end, shortcut = self.paths(x, drop_rate, norm)
        # relu(end(y) + shortcut), which some normalisations compute in one step.
        return norm_act(end, y, self.activation, shortcut)


class PreActivationBlock(ResidualBlock):
    """Normalises before each convolution of F, and adds last (He et al. 2016)."""

    preactivation = True

    @nn.compact
    def __call__(self, x: jax.Array, drop_rate: float | jax.Array = 0.0) -> jax.Array:
        """F(x) + shortcut(x); see ``ResidualBlock``."""
        # The first block of a net receives an activated map. Another stage's first
        # shortcut starts after the activation (He et al. 2016, appendix).
        y = x if self.position == "net" else self.norm_relu("norm1", x)
        x = y if self.position == "stage" else x
        first, *others = self.convolutions()
        y = first(y)
        for i, conv in enumerate(others, start=2):
            y = conv(self.norm_relu(f"norm{i}", y))
        end, shortcut = self.paths(x, drop_rate)
        return end(y) if shortcut is None else end(y) + shortcut


def _basic_convolutions(self):
    """The 3x3 convolutions of a basic block."""
    before, after = self.dilation
    conv = functools.partial(self.convolution, features=self.features, size=3)
    return [
        conv("conv1", strides=self.strides, dilation=before),
        *(conv(f"conv{i}", dilation=after) for i in range(2, self.num_convs + 1)),
    ]


def _bottleneck_convolutions(self):
    """The 1x1, 3x3 and 1x1 convolution of a bottleneck."""
    if self.stride_version not in STRIDE_VERSIONS:
        raise ValueError(
            f"stride_version is one of {', '.join(STRIDE_VERSIONS)}, "
            f"not {self.stride_version!r}"
        )
    first, second, dilation = 1, self.strides, self.dilation[0]
    if self.stride_version == "v1":
        first, second, dilation = self.strides, 1, self.dilation[1]
    width = self.features * self.base_width // 64 * self.groups
    middle = {"strides": second, "dilation": dilation, "groups": self.groups}
    return [
        self.convolution("conv1", width, 1, strides=first),
        self.convolution("conv2", width, 3, **middle),
        self.convolution("conv3", self.features * self.expansion, 1),
    ]


class BasicBlock(PostActivationBlock):
    """3x3 convolutions: two in the paper (Fig. 5 left).

    Attributes:
      num_convs: the number of convolutions; Zagoruyko & Komodakis 2016 compare 1 to 4.
    """

    num_convs: int = 2
    convolutions = _basic_convolutions


class BottleneckBlock(PostActivationBlock):
    """1x1, 3x3 and 1x1 convolutions; the last is four times as wide (Fig. 5 right).

    Attributes:
      stride_version: "v1" strides the first 1x1, as the paper and its released models
        do; "v1.5" strides the 3x3, as torchvision does.
      groups: groups of the 3x3 (ResNeXt, Xie et al. 2017).
      base_width: channels of each group of the 3x3 in a stage of 64 features; 128 with
        one group doubles the bottleneck's width (wide_resnet50_2).
    """

    stride_version: str = "v1.5"
    groups: int = 1
    base_width: int = 64
    expansion = 4
    convolutions = _bottleneck_convolutions


class PreActBasicBlock(PreActivationBlock):
    """The convolutions of ``BasicBlock`` with pre-activation (He et al. 2016)."""

    num_convs: int = 2
    convolutions = _basic_convolutions


class PreActBottleneckBlock(PreActivationBlock):
    """The convolutions of ``BottleneckBlock`` with pre-activation (He et al. 2016)."""

    stride_version: str = "v1.5"
    groups: int = 1
    base_width: int = 64
    expansion = 4
    convolutions = _bottleneck_convolutions
