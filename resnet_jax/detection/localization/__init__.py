"""ImageNet localisation (the paper's appendix C): one box for each class of an image.

A region proposal network whose scores and boxes are per class, as 1x1 convolutions on
the last map of a classification net. The class of an image is known, or guessed by a
classifier. The paper's R-CNN on top of the boxes is not here.
"""

from resnet_jax.detection.localization.error import localization_error
from resnet_jax.detection.localization.localizer import (
    Localizer,
    evaluate_localizer,
    localize,
    train_localizer,
)

__all__ = [
    "Localizer",
    "evaluate_localizer",
    "localization_error",
    "localize",
    "train_localizer",
]
