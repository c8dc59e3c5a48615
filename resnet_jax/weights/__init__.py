"""Files of weights: ours, torchvision's and timm's."""

from resnet_jax.weights.load_save import load_weights, save_weights

__all__ = ["load_weights", "save_weights"]
