"""Residual nets and their parts. Needs jax and flax alone."""

from resnet_jax.models import shortcuts
from resnet_jax.models.blocks import BasicBlock, BottleneckBlock, Conv
from resnet_jax.models.catalog import catalog_entry, create_model, list_models
from resnet_jax.models.normalization import BatchNorm
from resnet_jax.models.resnet import CifarStem, ImageNetStem, ResNet, Stage

__all__ = [
    "BasicBlock",
    "BatchNorm",
    "BottleneckBlock",
    "CifarStem",
    "Conv",
    "ImageNetStem",
    "ResNet",
    "Stage",
    "catalog_entry",
    "create_model",
    "list_models",
    "shortcuts",
]
