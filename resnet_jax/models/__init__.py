"""Residual nets and their parts. Needs jax and flax alone."""

from resnet_jax.models import shortcuts
from resnet_jax.models.blocks import (
    BasicBlock,
    BottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
    ResidualBlock,
)
from resnet_jax.models.catalog import catalog_entry, list_models
from resnet_jax.models.conv import Conv
from resnet_jax.models.create import create_model
from resnet_jax.models.features import FeatureMap
from resnet_jax.models.folding import fold_batch_norm
from resnet_jax.models.highway import HighwayNet
from resnet_jax.models.mlp import HighwayMLP, PlainMLP
from resnet_jax.models.norm import BatchNorm, NoNorm
from resnet_jax.models.residual import Highway, Residual
from resnet_jax.models.resnet import (
    CifarStem,
    DeepStem,
    ImageNetStem,
    ResNet,
)
from resnet_jax.models.stages import OverlappingStage, Stage
from resnet_jax.models.statistics import precise_batch_stats
from resnet_jax.models.surgery import deepen
from resnet_jax.models.trees import stack_blocks, trainable_mask, unstack_blocks
from resnet_jax.models.vgg import VGG
from resnet_jax.models.wrappers import SqueezeExcite, StochasticDepth

__all__ = [
    "VGG",
    "BasicBlock",
    "BatchNorm",
    "BottleneckBlock",
    "CifarStem",
    "Conv",
    "DeepStem",
    "FeatureMap",
    "Highway",
    "HighwayMLP",
    "HighwayNet",
    "ImageNetStem",
    "NoNorm",
    "OverlappingStage",
    "PlainMLP",
    "PreActBasicBlock",
    "PreActBottleneckBlock",
    "ResNet",
    "Residual",
    "ResidualBlock",
    "SqueezeExcite",
    "Stage",
    "StochasticDepth",
    "catalog_entry",
    "create_model",
    "deepen",
    "fold_batch_norm",
    "list_models",
    "precise_batch_stats",
    "shortcuts",
    "stack_blocks",
    "trainable_mask",
    "unstack_blocks",
]
