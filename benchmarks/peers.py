"""The nets ours are measured against: those of Flax's ImageNet example.

Written anew from that example's definition; ``peers_torch`` has the same nets in torch.
What differs from ours in the ImageNet nets: convolutions pad as 'SAME' does (one side
only where the stride is 2), batch normalisation is Flax's own, and the scale of each
block's last normalisation starts at zero. Shapes, parameters and multiply-adds of
the ImageNet nets are the same.

The example has no CIFAR net. ``cifar_resnet20`` is its basic block in the layout of
section 4.2: a stem of one 3x3 convolution with 16 channels and no pooling, and three
stages of three blocks (of one in ``cifar_resnet8``, which compiles fast). Its shortcuts
are projections where the shape changes; ours has the paper's option A there, which has
no parameters.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a peer is built from, whatever the library.

    Attributes:
      stage_sizes: blocks in each stage; each stage after the first halves the map and
        doubles the channels.
      bottleneck: blocks of 1x1, 3x3 and 1x1 instead of two 3x3 convolutions.
      cifar: the stem of the CIFAR nets instead of 7x7, stride 2, and pooling.
    """

    stage_sizes: tuple[int, ...]
    bottleneck: bool = False
    cifar: bool = False

    @property
    def width(self) -> int:
        """Channels of the stem and of the first stage's 3x3 convolutions."""
        return 16 if self.cifar else 64

    @property
    def num_classes(self) -> int:
        """Classes of the classifier."""
        return 10 if self.cifar else 1000

    @property
    def image_size(self) -> int:
        """Side of the images the net is meant for."""
        return 32 if self.cifar else 224


LAYOUTS = {
    "cifar_resnet8": Layout((1, 1, 1), cifar=True),
    "cifar_resnet20": Layout((3, 3, 3), cifar=True),
    "resnet18": Layout((2, 2, 2, 2)),
    "resnet34": Layout((3, 4, 6, 3)),
    "resnet50": Layout((3, 4, 6, 3), bottleneck=True),
    "resnet101": Layout((3, 4, 23, 3), bottleneck=True),
    "resnet152": Layout((3, 8, 36, 3), bottleneck=True),
}
"""The peers, by the name of our net."""


class _Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 of four times the width."""

    width: int
    strides: int
    bottleneck: bool
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(_norm, train=self.train, dtype=self.dtype)
        step = (self.strides, self.strides)
        if self.bottleneck:
            y = nn.relu(norm()(conv(self.width, (1, 1))(x)))
            y = nn.relu(norm()(conv(self.width, (3, 3), step)(y)))
            y = conv(4 * self.width, (1, 1))(y)
        else:
            y = nn.relu(norm()(conv(self.width, (3, 3), step)(x)))
            y = conv(self.width, (3, 3))(y)
        y = norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = norm()(conv(y.shape[-1], (1, 1), step)(x))
        return nn.relu(x + y)


class FlaxResNet(nn.Module):
    """The net of a layout: images (n, h, w, 3) to logits (n, classes), float32."""

    layout: Layout
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Normalises by the statistics of the batch where ``train`` is true."""
        layout = self.layout
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = _norm(train=train, dtype=self.dtype)
        if layout.cifar:
            x = nn.relu(norm(conv(layout.width, (3, 3))(images)))
        else:
            pad = [(3, 3), (3, 3)]
            x = conv(layout.width, (7, 7), (2, 2), padding=pad)(images)
            x = nn.max_pool(nn.relu(norm(x)), (3, 3), (2, 2), padding="SAME")
        for stage, size in enumerate(layout.stage_sizes):
            for index in range(size):
                x = _Block(
                    layout.width * 2**stage,
                    strides=2 if stage > 0 and index == 0 else 1,
                    bottleneck=layout.bottleneck,
                    train=train,
                    dtype=self.dtype,
                )(x)
        x = x.mean((1, 2))
        return nn.Dense(layout.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


def _norm(*, train: bool, dtype: Any, **options: Any) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        **options,
    )
