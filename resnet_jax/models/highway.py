"""Highway nets for CIFAR (Srivastava et al. 2015, "Training Very Deep Networks")."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.conv import Conv
from resnet_jax.models.residual import Highway
from resnet_jax.models.resnet import FeatureMap


class HighwayLayer(nn.Module):
    """A highway layer of two 3x3 convolutions, ``transform`` (with ReLU) and ``gate``.

    Attributes:
      gate_bias: initial value of the gate's bias.
      kernel_init: initialiser of both kernels.
      dtype: of the computation.
    """

    gate_bias: float = -2.0
    kernel_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) to the same."""
        conv = functools.partial(
            Conv,
            x.shape[-1],
            (3, 3),
            use_bias=True,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
        )
        transform = nn.Sequential([conv(name="transform"), nn.relu])
        gate_bias = nn.initializers.constant(self.gate_bias)
        return Highway(transform, conv(bias_init=gate_bias, name="gate"))(x)


class HighwayStage(nn.Module):
    """A 3x3 convolution with ReLU, ``conv``, then ``highway1``, ``highway2``, ...

    Attributes:
      size: the number of highway layers.
      features: channels of all layers.
      gate_bias: initial value of the gates' biases.
      kernel_init: initialiser of the kernels.
      dtype: of the computation.
    """

    size: int
    features: int
    gate_bias: float = -2.0
    kernel_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) to (n, h, w, features)."""
        x = Conv(
            self.features,
            (3, 3),
            use_bias=True,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = nn.relu(x)
        for index in range(self.size):
            x = HighwayLayer(
                self.gate_bias,
                self.kernel_init,
                self.dtype,
                name=f"highway{index + 1}",
            )(x)
        return x


class HighwayNet(nn.Module):
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
        alone, which is the same wherever a layer keeps the number of channels; their
        first convolution and classifier start from normal distributions.
      dtype: dtype of convolutions and maps; bfloat16 on accelerators.
    """

    widths: Sequence[int] = (32, 80, 128)
    highway_layers: Sequence[int] = (4, 5, 5)
    num_classes: int | None = 10
    bottleneck_features: int = 100
    gate_bias: float = -2.0
    dropout_rate: float = 0.0
    kernel_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Class logits.

        Args:
          images: (n, h, w, channels), floating point; 32x32 for CIFAR.
          train: whether dropout is active (pass ``rngs={"dropout": key}`` to ``apply``
            if its rate is above 0).

        Returns:
          (n, num_classes) float32 logits; (n, bottleneck_features) float32 pooled
          features where ``num_classes`` is None.

        Raises:
          ValueError: ``widths`` and ``highway_layers`` differ in length, or nothing
            remains of the images after the poolings.
        """
        return self._maps_and_output(images, train)[1]

    def features(
        self, images: jax.Array, train: bool = False
    ) -> tuple[FeatureMap, ...]:
        """The stages' outputs C1 .. C3 before their poolings, of strides 1, 2 and 4."""
        return self._maps_and_output(images, train)[0]

    @nn.compact
    def _maps_and_output(self, images, train):
        if len(self.widths) != len(self.highway_layers):
            raise ValueError(
                f"{len(self.widths)} widths but {len(self.highway_layers)} numbers of "
                "highway layers: a highway net has one of each for every stage"
            )
        smallest = 2 ** (len(self.widths) - 1)
        if min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"images of {images.shape[1]}x{images.shape[2]} pixels are too small: "
                f"{len(self.widths) - 1} poolings need at least {smallest}x{smallest}"
            )

        def dropout(x):
            return nn.Dropout(self.dropout_rate, deterministic=not train)(x)

        maps: list[FeatureMap] = []
        x = dropout(images.astype(self.dtype))
        stages = zip(self.highway_layers, self.widths, strict=True)
        for index, (size, width) in enumerate(stages):
            if index > 0:
                x = dropout(nn.max_pool(x, (2, 2), (2, 2)))
            x = HighwayStage(
                size,
                width,
                self.gate_bias,
                self.kernel_init,
                self.dtype,
                name=f"stage{index + 1}",
            )(x)
            maps.append(FeatureMap(x, f"C{index + 1}", 2**index))
        x = Conv(
            self.bottleneck_features,
            (1, 1),
            use_bias=True,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="bottleneck",
        )(x)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        output = nn.relu(x).mean(axis=(1, 2), dtype=wide)
        if self.num_classes is not None:
            head = nn.Dense(self.num_classes, kernel_init=self.kernel_init, name="head")
            output = head(dropout(output))
        return tuple(maps), output
