"""The appendix's localisation: its error in closed form, and nets that learn it."""

import dataclasses
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.data.order import Order
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.detection.anchors import Anchors
from resnet_jax.detection.localization import (
    Localizer,
    evaluate_localizer,
    localization_error,
    localize,
    train_localizer,
)
from resnet_jax.detection.localization.crops import Crops
from resnet_jax.detection.localization.net import (
    LocalizationNet,
    best_boxes,
    localization_loss,
)
from resnet_jax.errors import UserError
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.evaluation.protocols import Center
from resnet_jax.models import create_model, precise_batch_stats

ANCHORS = Anchors(sizes=(8, 16), ratios=(0.5, 1, 2), stride=4)


def tiny_net(name="cifar_resnet8", **options):
    """An untrained net, as ``load_net`` would return it."""
    model = create_model(name, num_classes=10, **options)
    image = jnp.zeros((1, 32, 32, 3))
    return TrainedNet(
        source="test",
        name=name,
        options={},
        model=model,
        variables=jax.jit(model.init)(jax.random.key(0), image),
        statistics=PixelStatistics(*np.full((2, 1, 1, 3), 0.5, np.float32)),
        protocol=Center(32),
        class_names=None,
    )


def rectangles(count, seed=0):
    """Dim noise with a bright rectangle: class 0 is red, class 1 is blue."""
    rng = np.random.default_rng(seed)
    images, boxes = [], []
    classes = rng.integers(0, 2, count)
    for kind in classes:
        height, width = rng.integers(32, 49, 2)
        image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        h, w = rng.integers(10, 19, 2)
        y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        image[y : y + h, x : x + w] = (230, 40, 40) if kind == 0 else (40, 40, 230)
        images.append(image)
        boxes.append(np.array([[x, y, x + w, y + h]], np.float32))
    return images, boxes, classes


@pytest.fixture(scope="module")
def learned():
    images, boxes, classes = rectangles(64)
    return train_localizer(
        tiny_net(),
        images,
        boxes,
        classes,
        2,
        steps=150,
        learning_rate=optax.cosine_decay_schedule(0.02, 150),
        batch_size=32,
        size=32,
        shorter_sides=(32, 40),
        anchors=ANCHORS,
    )


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"shorter_sides": (32,), "crop": 32}, 0.1),
        ({"shorter_sides": (32,), "crop": None}, 0.0),
        ({"shorter_sides": (32, 40), "crop": None}, 0.0),
    ],
)
def test_bright_rectangles_are_found_in_new_images(learned, options, most):
    images, boxes, classes = rectangles(40, seed=1)
    assert learned.losses[-10:].mean() < learned.losses[:10].mean() / 4
    result = evaluate_localizer(learned, images, boxes, classes, **options)
    print(options, result)
    assert result["localization_error"] <= most
    assert result["classification_error"] == 0


def test_guesses(learned):
    images, boxes, classes = rectangles(20, seed=2)
    options = {"shorter_sides": (32,), "crop": None}
    both = np.tile([1, 0], (20, 1))
    result = evaluate_localizer(learned, images, boxes, classes, both, **options)
    assert result == {
        "localization_error": 0,
        "classification_error": 0,
        "images": 20,
        "guesses": 2,
    }
    wrong = 1 - classes[:, None]
    result = evaluate_localizer(learned, images, boxes, classes, wrong, **options)
    assert result["localization_error"] == result["classification_error"] == 1
