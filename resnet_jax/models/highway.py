"""Highway nets for CIFAR (Srivastava et al. 2015, "Training Very Deep Networks")."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.conv import INITIALIZATIONS, Conv
from resnet_jax.models.factories import ModuleFactory
from resnet_jax.models.features import FeatureMap, FeatureNet, check_stages
from resnet_jax.models.pooling import Pool, global_average, max_pool
from resnet_jax.models.residual import HighwayLayer


class HighwayStage(nn.Module):
    """A convolution with ReLU, ``conv``, and ``size`` layers ``highway1``, ...

    Attributes:
      size: the number of highway layers.
      features: channels of all layers.
      conv: factory of the convolutions, ``conv(features, name=...)``.
      gate_bias: initial value of the gates' biases.
    """

    size: int
    features: int
    conv: ModuleFactory
    gate_bias: float = -2.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) to (n, h, w, features)."""
        x = nn.relu(self.conv(self.features, name="conv")(x))
        for index in range(self.size):
            x = HighwayLayer(self.conv, self.gate_bias, name=f"highway{index + 1}")(x)
        return x


class HighwayNet(FeatureNet):
    """A convolutional highway net: stages, a bottleneck, pooling and a classifier.

    2x2 max-pooling halves the map between two stages. A 1x1 convolution with ReLU,
    global average pooling and the classifier follow the last stage. There is no batch
    normalisation; every convolution has a bias.

    The defaults are the authors' released 19-layer net for CIFAR: 17 layers of 3x3
    convolutions, the 1x1 and the classifier, 2,256,838 parameters for 10 classes (2.3M
    in the paper). The layout of their net of 32 layers and 1.25M parameters is not
    published; our ``widths=(32, 48, 64)`` with ``highway_layers=(9, 9, 9)`` has
    1,255,270.

    Variables: ``params`` alone, float32 for every ``dtype``: ``stage1/conv``,
    ``stage1/highway1/transform``, ``stage1/highway1/gate``, ``bottleneck``, ``head``.
    ``features`` returns the output of each stage before its pooling, C1 .. C3.

    Attributes:
      widths: channels of each stage.
      highway_layers: highway layers of each stage.
      num_classes: classes of the classifier; None leaves it out.
      bottleneck_features: channels of the 1x1 convolution.
      gate_bias: initial value of the gates' biases; the more negative, the closer the
        highway layers start to the identity.
      dropout_rate: rate on the images, after each pooling and before the classifier;
        the authors train with 0.2.
      kernel_init: initialiser of all kernels. The authors' "xavier" takes the fan-in
        alone, the same where a layer keeps the number of channels; their first
        convolution and classifier start from normal distributions.
      dtype: dtype of convolutions and maps; bfloat16 on accelerators.
    """

    widths: Sequence[int] = (32, 80, 128)
    highway_layers: Sequence[int] = (4, 5, 5)
    num_classes: int | None = 10
    bottleneck_features: int = 100
    gate_bias: float = -2.0
    dropout_rate: float = 0.0
    kernel_init: Any = INITIALIZATIONS["xavier"]
    dtype: Any = jnp.float32

    @nn.compact
    def _maps_and_output(self, images, train):
        sizes, poolings = self.highway_layers, len(self.widths) - 1
        check_stages(images, poolings, self.widths, highway_layers=sizes)
        conv = functools.partial(
            Conv,
            kernel_size=(3, 3),
            use_bias=True,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
        )

        def dropout(x):
            return nn.Dropout(self.dropout_rate, deterministic=not train)(x)

        maps: list[FeatureMap] = []
        x = dropout(images.astype(self.dtype))
        for index, (size, width) in enumerate(zip(sizes, self.widths, strict=True)):
            if index > 0:
                pool = functools.partial(max_pool, size=2)
                x = dropout(Pool(pool, rounds_down=True)(x))
            name = f"stage{index + 1}"
            x = HighwayStage(size, width, conv, self.gate_bias, name=name)(x)
            maps.append(FeatureMap(x, f"C{index + 1}", 2**index))
        features = self.bottleneck_features
        x = conv(features, kernel_size=(1, 1), name="bottleneck")(x)
        output = Pool(global_average)(nn.relu(x))
        if self.num_classes is not None:
            head = nn.Dense(self.num_classes, kernel_init=self.kernel_init, name="head")
            output = head(dropout(output))
        return tuple(maps), output
