"""Fully connected plain and highway nets for MNIST (Srivastava et al. 2015, section 3).

Nets of one width whose depth alone varies: how far can they still be trained?
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.conv import INITIALIZATIONS
from resnet_jax.models.factories import ModuleFactory
from resnet_jax.models.fused import widen
from resnet_jax.models.residual import HighwayLayer


class PlainMLP(nn.Module):
    """``depth`` dense layers with ReLU on all pixels, and a classifier.

    A layer of 71 units has 5,112 parameters, the nearest to the 5,100 of a highway
    layer of 50 units (``HighwayMLP``). The depth in a net's name counts the first layer
    but not the classifier.

    Variables: ``params`` alone, float32 for every ``dtype``: ``layer1``, ``layer2``,
    ..., ``head``.

    Attributes:
      depth: the number of layers, without the classifier.
      width: units of each layer.
      num_classes: classes of the classifier; None leaves it out.
      kernel_init: initialiser of all kernels; He's with the fan-in, as in the paper.
      dtype: dtype of the computation; bfloat16 on accelerators.
    """

    depth: int = 10
    width: int = 71
    num_classes: int | None = 10
    kernel_init: Any = INITIALIZATIONS["he_fan_in"]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """(n, h, w, channels) to (n, num_classes) float32 logits.

        If ``num_classes`` is None, returns (n, width) float32 features. ``train`` is
        ignored.
        """
        del train
        dense = functools.partial(
            nn.Dense, kernel_init=self.kernel_init, dtype=self.dtype
        )
        x = images.reshape(images.shape[0], -1).astype(self.dtype)
        x = nn.relu(dense(self.width, name="layer1")(x))
        for index in range(1, self.depth):
            x = self.layer(dense, f"layer{index + 1}")(x)
        output = widen(x)
        if self.num_classes is not None:
            head = nn.Dense(self.num_classes, kernel_init=self.kernel_init, name="head")
            output = head(output)
        return output

    def layer(self, dense: ModuleFactory, name: str) -> nn.Module:
        """Any layer after the first: (n, width) to (n, width)."""
        return nn.Sequential([dense(self.width, name=name), nn.relu])


class HighwayMLP(PlainMLP):
    """A dense layer on all pixels, ``depth`` - 1 highway layers and a classifier.

    Attributes:
      depth, num_classes, kernel_init, dtype: see ``PlainMLP``.
      width: units of each layer.
      gate_bias: initial value of the gates' biases. The paper searched -1 to -10 and
        does not say what it chose.
    """

    width: int = 50
    gate_bias: float = -2.0

    def layer(self, dense: ModuleFactory, name: str) -> nn.Module:
        """See ``PlainMLP``."""
        return HighwayLayer(dense, self.gate_bias, name=name)
