"""Building blocks: y = F(x, {W_i}) + shortcut(x), then ReLU (equations 1 and 2).

A block is its list of convolutions (``layers``) in one of two orders: convolution,
normalisation, ReLU (He et al. 2015), or normalisation, ReLU, convolution (the
pre-activation of He et al. 2016).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
from flax import linen as nn

from resnet_jax.models.convolution import Conv
from resnet_jax.models.factories import ModuleFactory
from resnet_jax.models.normalization import fuses, norm_act
from resnet_jax.models.shortcuts import Added, Projection, Shortcut

STRIDE_VERSIONS = ("v1", "v1.5")


class Layer(NamedTuple):
    """One convolution of a block."""

    size: int
    features: int
    groups: int = 1


class Branch(NamedTuple):
    """Where a shortcut leaves, if not at the block's own input.

    ``strides`` is the stride from there to the block's output.
    """

    x: jax.Array
    strides: int


class ResidualBlock(nn.Module):
    """What all blocks share; a subclass says its ``layers`` and which of them strides.

    Attributes:
      features: channels of the block before any expansion.
      strides: of the block and of the shortcut.
      norm: factory of the normalisations, ``norm(name=...)``.
      shortcut: how the block's input is joined to the residual function.
      conv: factory of the convolutions.
      activation: after each normalisation, and after the addition.
      dilation: spacing of taps at the block's input and behind the convolution that
        would stride; they differ where dilation stands for a stride.
      preactivation: normalisation and activation come before each convolution, and
        nothing after the addition.
      position: "net" is the first block of a net, "stage" that of another stage,
        "inner" any other. With pre-activation the shortcut of a stage's first block
        leaves after the first activation, and the net's first block is given an
        activated map (He et al. 2016, appendix).
      zero_init_last: the last normalisation's scale starts at zero, so that the block
        starts as its shortcut (Goyal et al. 2017).
      squeeze_excite: factory of a gate on the residual function.
      dropout: factory of a dropout between the convolutions (Zagoruyko & Komodakis
        2016).
      stochastic_depth: factory of a module ``(y, rate)`` that drops the residual
        function in training.
      train: whether a shortcut that acts at random does so.
    """

    features: int
    strides: int
    norm: ModuleFactory
    shortcut: Shortcut = Projection()
    conv: ModuleFactory = Conv
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dilation: tuple[int, int] = (1, 1)
    preactivation: bool = False
    position: Literal["net", "stage", "inner"] = "inner"
    zero_init_last: bool = False
    squeeze_excite: ModuleFactory | None = None
    dropout: ModuleFactory | None = None
    stochastic_depth: ModuleFactory | None = None
    train: bool = False

    def layers(self) -> list[Layer]:
        """The convolutions of the residual function, in order."""
        raise NotImplementedError

    @property
    def strided_layer(self) -> int:
        """Index of the convolution that strides."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        drop_rate: float | jax.Array = 0.0,
        branch: Branch | None = None,
    ) -> jax.Array:
        """The block's output.

        Args:
          x: (n, h, w, c).
          drop_rate: with which ``stochastic_depth`` drops the residual function.
          branch: where the shortcut leaves, if not at ``x``.

        Returns:
          (n, ceil(h / strides), ceil(w / strides), channels of the last layer).
        """
        if self.preactivation:
            if self.zero_init_last:
                raise ValueError(
                    "zero_init_last needs a normalisation at the block's end, which "
                    "pre-activation has not"
                )
            y, leaves = self._preactivated(x)
        else:
            y, leaves = self._postactivated(x), x
        branch = branch or Branch(leaves, self.strides)
        options = (branch.strides, self.conv, self.norm, self.dilation)
        if not self.preactivation:
            norm = self._last_norm()
            # Where only the addition stands between it and the activation.
            bare = self.squeeze_excite is None and self.stochastic_depth is None
            fused = bare and fuses(norm, self.activation)
            if fused and isinstance(self.shortcut, Added):
                added = self.shortcut.addend(branch.x, y.shape, *options)
                return norm(y, added, relu=True)
            y = norm(y)
        if self.squeeze_excite is not None:
            y = self.squeeze_excite(name="squeeze_excite")(y)
        if self.stochastic_depth is not None:
            y = self.stochastic_depth(name="stochastic_depth")(y, drop_rate)
        y = self.shortcut(branch.x, y, *options, self.train)
        return y if self.preactivation else self.activation(y)

    def _postactivated(self, x):
        """Convolutions; between them normalisation and activation."""
        y = self._convolve(0, x)
        for index in range(1, len(self.layers())):
            norm = self.norm(name=f"norm{index}")
            y = self._drop(norm_act(norm, y, self.activation))
            y = self._convolve(index, y)
        return y

    def _last_norm(self):
        options = {"scale_init": nn.initializers.zeros} if self.zero_init_last else {}
        return self.norm(name=f"norm{len(self.layers())}", **options)

    def _preactivated(self, x):
        """Normalisation, activation and convolution in turn; also the branch."""
        y, leaves = x, x
        for index in range(len(self.layers())):
            if index > 0 or self.position != "net":
                norm = self.norm(name=f"norm{index + 1}")
                y = norm_act(norm, y, self.activation)
            if index > 0:
                y = self._drop(y)
            elif self.position == "stage":
                leaves = y
            y = self._convolve(index, y)
        return y, leaves

    def _convolve(self, index, x):
        layer, strided = self.layers()[index], self.strided_layer
        # Up to the convolution that would stride, taps have the input's spacing.
        options = {
            "strides": self.strides if index == strided else 1,
            "dilation": self.dilation[0] if index <= strided else self.dilation[1],
            "groups": layer.groups,
        }
        # A factory needs to know only what is asked of it.
        asked = {name: value for name, value in options.items() if value != 1}
        size = (layer.size, layer.size)
        name = f"conv{index + 1}"
        return self.conv(layer.features, size, name=name, **asked)(x)

    def _drop(self, y):
        return y if self.dropout is None else self.dropout()(y)


class BasicBlock(ResidualBlock):
    """3x3 convolutions: two of them in the paper (Fig. 5 left).

    Attributes:
      num_convs: how many; Zagoruyko & Komodakis 2016 compare 1 to 4.
    """

    num_convs: int = 2
    expansion = 1

    def layers(self) -> list[Layer]:
        """See ``ResidualBlock``."""
        return [Layer(3, self.features)] * self.num_convs

    @property
    def strided_layer(self) -> int:
        """The first convolution strides."""
        return 0


class BottleneckBlock(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions; the last is four times as wide (Fig. 5 right).

    Attributes:
      stride_version: "v1" strides the first 1x1, as the paper and its released
        models do; "v1.5" strides the 3x3, as torchvision does.
      groups: of the 3x3 (ResNeXt, Xie et al. 2017).
      base_width: channels of a group of the 3x3 in the stage of 64 features; 128 with
        one group is twice as wide a bottleneck (wide_resnet50_2).
    """

    stride_version: str = "v1.5"
    groups: int = 1
    base_width: int = 64
    expansion = 4

    def layers(self) -> list[Layer]:
        """See ``ResidualBlock``."""
        width = self.features * self.base_width // 64 * self.groups
        return [
            Layer(1, width),
            Layer(3, width, self.groups),
            Layer(1, self.features * self.expansion),
        ]

    @property
    def strided_layer(self) -> int:
        """The 1x1 or the 3x3 strides."""
        if self.stride_version not in STRIDE_VERSIONS:
            raise ValueError(
                f"stride_version is one of {', '.join(STRIDE_VERSIONS)}, "
                f"not {self.stride_version!r}"
            )
        return STRIDE_VERSIONS.index(self.stride_version)
