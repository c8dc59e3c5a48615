"""Object detection: Faster R-CNN on residual nets (section 4.3 of the paper).

The names below are what most users need; each imports what it needs when it is first
used. The functions on arrays (``nms``, ``roi``, ``boxes``, ``anchors``, ``voc_ap``) are
modules of this package, and so is ``localization`` (appendix C).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from resnet_jax import config as _config

if TYPE_CHECKING:
    from resnet_jax.config import DetectionConfig
    from resnet_jax.detection.detections import Detections
    from resnet_jax.detection.detector import Detector, load_detector
    from resnet_jax.detection.drawing import draw_boxes
    from resnet_jax.detection.evaluate import evaluate_detector
    from resnet_jax.detection.faster_rcnn import FasterRCNN, make_detector
    from resnet_jax.detection.predict import detect_pictures, predict_boxes
    from resnet_jax.detection.prepare import prepare_detection
    from resnet_jax.detection.train import train_detector

__all__ = [
    "Detections",
    "Detector",
    "FasterRCNN",
    "default_config",
    "detect_pictures",
    "draw_boxes",
    "evaluate_detector",
    "load_config",
    "load_detector",
    "make_detector",
    "predict_boxes",
    "prepare_detection",
    "train_detector",
]

_LAZY = {
    "Detections": "detections",
    "Detector": "detector",
    "FasterRCNN": "faster_rcnn",
    "detect_pictures": "predict",
    "draw_boxes": "drawing",
    "evaluate_detector": "evaluate",
    "load_detector": "detector",
    "make_detector": "faster_rcnn",
    "predict_boxes": "predict",
    "prepare_detection": "prepare",
    "train_detector": "train",
}


def load_config(
    spec: str, overrides: Mapping[str, Any] | None = None
) -> "DetectionConfig":
    """Reads the config file of a detector and resolves it.

    Args:
      spec: a path, or a name such as "detection/bccd"; see ``resnet_jax.load_config``.
      overrides: dotted field names to values, as text if you like.

    Raises:
      UserError: the file or a value is wrong, or the config is a classifier's.
    """
    return _config.load_config(spec, overrides, _config.DetectionConfig)


def default_config() -> Any:
    """The config of a detector with every field at its default, a ConfigDict."""
    return _config.default_config(_config.DetectionConfig)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__]
