"""A tiny detector on four images, for tests."""

import numpy as np

from resnet_jax.config import DetectionConfig, default_config, resolve
from resnet_jax.data.transforms import PixelStatistics
from tests.detection.layouts import write_voc

SIZE = (64, 96)
SAME = PixelStatistics(np.zeros((1, 1, 3)), np.full((1, 1, 3), 1 / 255))
"""With these, images are normalised already."""
OBJECTS = {
    "wide": [(4, 8, 44, 28), (50, 40, 90, 60), (30, 6, 70, 24), (10, 36, 52, 58)],
    "tall": [(60, 4, 80, 44), (10, 20, 30, 60), (6, 20, 24, 60), (70, 10, 90, 50)],
}


def write_four_images(root):
    """Four images with one wide and one tall rectangle each, to train and test on."""
    images = {
        f"image{index}": (
            SIZE[1],
            SIZE[0],
            [(name, boxes[index]) for name, boxes in OBJECTS.items()],
        )
        for index in range(4)
    }
    write_voc(root, "train", images)
    write_voc(root, "test", images)
    return root


def tiny_config(root, **overrides):
    """A config that learns the four images in less than a minute."""
    config = default_config(DetectionConfig)
    values = {
        "model.name": "resnet10t",
        "model.width": 16,
        "data.path": str(root),
        "data.name": "rectangles",
        "data.train_split": "train",
        "data.shorter_side": SIZE[0],
        "data.longer_side": SIZE[1],
        "detector.anchor_sizes": (24.0, 40.0),
        "detector.border_anchors": True,
        "detector.rpn_features": 32,
        "detector.rpn_samples": 32,
        "detector.smallest_proposal": 4.0,
        "detector.train_candidates": 120,
        "detector.train_proposals": 30,
        "detector.test_candidates": 100,
        "detector.test_proposals": 20,
        "detector.roi_samples": 16,
        "detector.roi_size": 7,
        "detector.roi_low": 0.0,
        "training.global_batch_size": 8,
        "training.steps": 4,
        "optimizer.learning_rate": 0.02,
        "optimizer.weight_decay": 1e-4,
        "checkpoint.every_steps": 2,
        "tracking.trackers": (),
        "compilation_cache": None,
    }
    for name, value in (values | overrides).items():
        *sections, key = name.split(".")
        target = config
        for section in sections:
            target = target[section]
        target[key] = value
    return resolve(config, DetectionConfig)


def batch_of_four():
    """The four images as a batch of training, on the host."""
    from tests.detection.layouts import picture

    boxes = np.array(list(OBJECTS.values()), np.float32).transpose(1, 0, 2)
    images = np.stack([np.asarray(picture(*SIZE[::-1], b.astype(int))) for b in boxes])
    return {
        "images": images,
        "sizes": np.tile(np.array(SIZE, np.int32), (4, 1)),
        "boxes": boxes,
        "classes": np.tile(np.array([1, 0], np.int32), (4, 1)),
    }
