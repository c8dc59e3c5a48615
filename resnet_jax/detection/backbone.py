"""A classification net cut in two: a trunk for images and a tail for regions.

The paper shares conv1 to conv4_x among the regions of an image and applies conv5_x to
each of them (section 4.3 and appendix A). VGG-16 shares its convolutions and applies
fc6 and fc7 (Girshick 2015).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.config.build import model_options
from resnet_jax.config.detection import BackboneConfig
from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.models.features import FeatureNet
from resnet_jax.models.masking import sizes_of_map
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.vgg import VGG, small_normal

STRIDE = 16
"""Of the trunk's map."""


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The two parts of a net; their variables have the net's own names.

    Attributes:
      net: the whole net, without a classifier.
      trunk: a net whose last map has a stride of 16.
      tail: pooled regions (n, size, size, c) to features (n, d); called with ``train``.
      roi_size: side of a pooled region.
      sizes_of_map: sizes of images (n, 2) to those of their parts of the map.
      frozen: the parts that the paper and Fast R-CNN keep as they were trained on
        ImageNet.
    """

    net: FeatureNet
    trunk: FeatureNet
    tail: nn.Module
    roi_size: int
    sizes_of_map: Callable[[jax.Array], jax.Array]
    frozen: tuple[str, ...]


class FullyConnected(nn.Module):
    """The two hidden layers of a VGG, ``fc1`` and ``fc2``, with ReLU and dropout."""

    features: int
    dropout_rate: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(n, h, w, c) to (n, features)."""
        x = x.reshape(len(x), -1)
        for name in ("fc1", "fc2"):
            x = nn.Dense(
                self.features, kernel_init=small_normal, dtype=self.dtype, name=name
            )(x)
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(nn.relu(x))
        return x


def make_backbone(config: BackboneConfig) -> Backbone:
    """The backbone of a config, with the statistics frozen that it says.

    Raises:
      UserError: the net has no map of stride 16 before its last stage.
    """
    options = model_options(config)
    net: Any = create_model(
        config.name, num_classes=None, dtype=jnp.dtype(config.dtype), **options
    )
    if isinstance(net, ResNet):
        backbone = _of_resnet(net, config)
    elif isinstance(net, VGG):
        backbone = _of_vgg(net, config)
    else:
        raise _unfit(config.name)
    has_weights = config.weights is not None
    if config.frozen_statistics or (config.frozen_statistics is None and has_weights):
        frozen: bool | Sequence[str] = True
    else:
        frozen = frozen_parts(config, backbone)
    trunk, tail = backbone.trunk.clone(batch_norm_frozen=frozen), backbone.tail
    if isinstance(tail, ResNet):
        tail = tail.clone(batch_norm_frozen=frozen)
    return dataclasses.replace(backbone, trunk=trunk, tail=tail)


def frozen_parts(config: BackboneConfig, backbone: Backbone) -> tuple[str, ...]:
    """The parts that a config does not train."""
    if config.frozen is not None:
        return config.frozen
    return backbone.frozen if config.weights is not None else ()


def _of_resnet(net: ResNet, config: BackboneConfig) -> Backbone:
    if config.width is not None:
        net = net.clone(width=config.width)
    if len(net.stage_sizes) != 4 or net.output_stride is not None:
        raise _unfit(config.name)
    return Backbone(
        net=net,
        trunk=net.clone(stages=(0, 3)),
        tail=net.clone(stages=(3, 4)),
        roi_size=14,
        sizes_of_map=lambda sizes: sizes_of_map(sizes, STRIDE),
        frozen=("stem", "stage1"),
    )


def _of_vgg(net: VGG, config: BackboneConfig) -> Backbone:
    if config.width is not None:
        raise UserError("model.width is for residual and plain nets, not for a VGG")
    return Backbone(
        # Its dense layers need a classifier, which loading replaces.
        net=net.clone(num_classes=1),
        trunk=net.clone(only_stages=True),
        tail=FullyConnected(net.hidden_features, net.dropout_rate, net.dtype),
        roi_size=7,
        # Its four poolings each lose an odd pixel.
        sizes_of_map=lambda sizes: sizes // STRIDE,
        frozen=("stage1", "stage2"),
    )


def _unfit(name: str) -> UserError:
    return UserError(
        f"model.name={name} has no map of stride {STRIDE} to propose regions on: take "
        "an ImageNet net such as resnet50, plain34 or vgg16"
    )
