"""VGG nets (Simonyan & Zisserman 2014), optionally with batch normalisation.

The layout is torchvision's, so that its weights can be converted.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.conv import INITIALIZATIONS, Conv
from resnet_jax.models.factories import ModuleFactory
from resnet_jax.models.features import FeatureMap, FeatureNet, check_stages
from resnet_jax.models.fused import widen
from resnet_jax.models.norm import BatchNorm, NoNorm, groups_of, is_frozen, norm_act
from resnet_jax.models.pooling import (
    Pool,
    adaptive_average_pool,
    global_average,
    max_pool,
)

POOLED_SIZE = 7
"""Side of the map before the classifier: that of a 224x224 image."""

small_normal = INITIALIZATIONS["normal_0.01"]
"""The initialiser of the dense layers in torchvision: a standard deviation of 0.01."""


class VGGStage(nn.Module):
    """``size`` 3x3 convolutions with bias, each with normalisation and ReLU."""

    size: int
    features: int
    norm: ModuleFactory = NoNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) to (n, h, w, features)."""
        for index in range(1, self.size + 1):
            options: dict[str, Any] = {"use_bias": True, "dtype": self.dtype}
            conv = Conv(self.features, (3, 3), name=f"conv{index}", **options)
            x = norm_act(self.norm(name=f"norm{index}"), conv(x))
        return x


class VGG(FeatureNet):
    """Stages of 3x3 convolutions, each followed by 2x2 max-pooling; three dense layers.

    The defaults are configuration D, VGG-16; ``stage_convs=(2, 2, 4, 4, 4)`` is
    configuration E, VGG-19. As in torchvision, the last map is pooled to 7x7 before the
    dense layers, so that images of any size from 32x32 work; at 224x224 this changes
    nothing.

    Variables: ``params``, and ``batch_stats`` with batch normalisation, float32 for
    every ``dtype``: ``stage1/conv1``, ``stage1/norm1``, ``fc1``, ``fc2``, ``head``.
    The rows of ``fc1``'s kernel are the flattened (7, 7, channels) of the pooled map.
    ``features`` returns the output of each stage before its pooling, C1 .. C5.

    Attributes:
      stage_convs: the number of convolutions of each stage.
      widths: channels of each stage.
      num_classes: classes of the classifier; None leaves out all dense layers and
        averages the last map after its pooling.
      hidden_features: features of ``fc1`` and ``fc2``.
      dropout_rate: rate after ``fc1`` and ``fc2``.
      batch_norm: whether a batch normalisation follows each convolution.
      norm: its factory: ``BatchNorm``, or a partial of it with options.
      batch_norm_frozen: see ``ResNet``.
      dtype: dtype of all layers but ``head``; bfloat16 on accelerators.
      only_stages: end with the last stage's map, for nets that go on in another way,
        such as detectors.
    """

    stage_convs: Sequence[int] = (2, 2, 3, 3, 3)
    widths: Sequence[int] = (64, 128, 256, 512, 512)
    num_classes: int | None = 1000
    hidden_features: int = 4096
    dropout_rate: float = 0.5
    batch_norm: bool = False
    norm: ModuleFactory = BatchNorm
    batch_norm_frozen: bool | Sequence[str] = False
    dtype: Any = jnp.float32
    only_stages: bool = False

    @property
    def batch_norm_groups(self) -> int:
        """Parts of the batch that are normalised separately, see BatchNorm."""
        return groups_of(self.norm)

    @nn.compact
    def _maps_and_output(self, images, train):
        sizes, poolings = self.stage_convs, len(self.widths)
        check_stages(images, poolings, self.widths, stage_convs=sizes)
        maps: list[FeatureMap] = []
        x = images.astype(self.dtype)
        for index, (size, width) in enumerate(zip(sizes, self.widths, strict=True)):
            name = f"stage{index + 1}"
            norm: ModuleFactory = NoNorm
            if self.batch_norm:
                average = not train or is_frozen(self.batch_norm_frozen, name)
                norm = functools.partial(
                    self.norm, use_running_average=average, dtype=self.dtype
                )
            x = VGGStage(size, width, norm, self.dtype, name=name)(x)
            maps.append(FeatureMap(x, f"C{index + 1}", 2**index))
            if self.only_stages and index + 1 == poolings:
                return tuple(maps), x
            x = Pool(functools.partial(max_pool, size=2), rounds_down=True)(x)
        if self.num_classes is None:
            return tuple(maps), Pool(global_average)(x)
        to_square = functools.partial(adaptive_average_pool, size=POOLED_SIZE)
        x = Pool(to_square)(x).reshape(len(x), -1)
        dense = functools.partial(nn.Dense, kernel_init=small_normal)
        for name in ("fc1", "fc2"):
            x = dense(self.hidden_features, dtype=self.dtype, name=name)(x)
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(nn.relu(x))
        return tuple(maps), dense(self.num_classes, name="head")(widen(x))
