"""Weights of nets in files: ours, torchvision's and timm's."""

from resnet_jax.weights.convert import convert_weights
from resnet_jax.weights.load_save import load_weights, save_weights

__all__ = ["convert_weights", "load_weights", "save_weights"]
