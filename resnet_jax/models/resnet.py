"""The residual net: a stem, stages of blocks, global average pooling and a classifier.

One module serves the ImageNet nets (Table 1), the CIFAR nets (section 4.2) and the
plain nets they are compared with: a variant is a choice of stem, block and shortcut.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.blocks import BasicBlock, Conv
from resnet_jax.models.normalization import BatchNorm, ModuleFactory
from resnet_jax.models.shortcuts import Projection, Shortcut

fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform in +-1/sqrt(fan-in): the classifier of the released Torch nets."""


class ImageNetStem(nn.Module):
    """7x7 convolution of stride 2, normalisation, ReLU and 3x3 max-pooling of stride 2.

    The pooling pads one pixel on every side, as Torch's does.
    """

    features: int
    conv: ModuleFactory
    norm: ModuleFactory

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns C1, the map before the pooling (stride 2), and the pooled map."""
        c1 = self.conv(self.features, (7, 7), strides=2, name="conv")(x)
        c1 = nn.relu(self.norm(name="norm")(c1))
        return c1, nn.max_pool(c1, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


class CifarStem(nn.Module):
    """3x3 convolution of stride 1, normalisation and ReLU (section 4.2)."""

    features: int
    conv: ModuleFactory
    norm: ModuleFactory

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns C1 twice: there is no pooling."""
        x = self.conv(self.features, (3, 3), name="conv")(x)
        c1 = nn.relu(self.norm(name="norm")(x))
        return c1, c1


class Stage(nn.Module):
    """Blocks on maps of one size; the first block may halve the map.

    Attributes:
      size: the number of blocks.
      features: the blocks' ``features``.
      strides: stride of the first block.
      block: factory of the blocks.
    """

    size: int
    features: int
    strides: int
    block: ModuleFactory

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) to (n, ceil(h / strides), ceil(w / strides), channels)."""
        for index in range(self.size):
            strides = self.strides if index == 0 else 1
            name = f"block{index + 1}"
            x = self.block(self.features, strides, name=name)(x)
        return x


class ResNet(nn.Module):
    """A residual or plain net of section 3.3 or 4.2.

    Variables: ``params`` and ``batch_stats``, float32 for every ``dtype``, under
    names that speak: ``stem/conv``, ``stage2/block3/conv2``, ``head``.

    Attributes:
      stage_sizes: blocks in each stage.
      block: BasicBlock or BottleneckBlock.
      shortcut: a value from ``models.shortcuts``.
      stem: ImageNetStem or CifarStem.
      width: channels of the stem and ``features`` of the first stage; doubled at
        every further stage.
      num_classes: classes of the classifier; None leaves it out.
      stride_version: where a bottleneck strides: "v1" or "v1.5".
      batch_norm_groups, batch_norm_momentum, batch_norm_epsilon: see BatchNorm.
      dtype: dtype of convolutions and maps; bfloat16 on accelerators.
    """

    stage_sizes: Sequence[int]
    block: Any = BasicBlock
    shortcut: Shortcut = Projection()
    stem: Any = ImageNetStem
    width: int = 64
    num_classes: int | None = 1000
    stride_version: str = "v1.5"
    batch_norm_groups: int = 1
    batch_norm_momentum: float = 0.9
    batch_norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Class logits.

        Args:
          images: (n, h, w, channels), floating point.
          train: normalise by the batch's statistics and update the running ones
            (pass ``mutable=["batch_stats"]`` to ``apply``).

        Returns:
          (n, num_classes) float32 logits; (n, channels of the last map) float32
          pooled features where ``num_classes`` is None.
        """
        return self._maps_and_output(images, train)[1]

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """The maps C1 .. C5 of an ImageNet net, C1 .. C4 of a CIFAR net.

        C1 is the stem's, before pooling; each further one is the output of a stage.
        """
        return self._maps_and_output(images, train)[0]

    @nn.compact
    def _maps_and_output(self, images, train):
        conv = functools.partial(Conv, dtype=self.dtype)
        norm = functools.partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.batch_norm_momentum,
            epsilon=self.batch_norm_epsilon,
            groups=self.batch_norm_groups,
            dtype=self.dtype,
        )
        block = functools.partial(
            self.block,
            shortcut=self.shortcut,
            conv=conv,
            norm=norm,
            stride_version=self.stride_version,
        )
        stem = self.stem(self.width, conv=conv, norm=norm, name="stem")
        c1, x = stem(images.astype(self.dtype))
        maps = [c1]
        for index, size in enumerate(self.stage_sizes):
            x = Stage(
                size,
                features=self.width * 2**index,
                strides=1 if index == 0 else 2,
                block=block,
                name=f"stage{index + 1}",
            )(x)
            maps.append(x)
        output = x.mean(axis=(1, 2), dtype=jnp.float32)
        if self.num_classes is not None:
            head = nn.Dense(self.num_classes, kernel_init=fan_in_uniform, name="head")
            output = head(output)
        return maps, output
