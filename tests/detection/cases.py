"""Made-up objects and detections, and readers of real ones that share no code."""

import json
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from resnet_jax.detection.annotations import Annotation
from resnet_jax.detection.detections import Detections

VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle"),
    *("bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person"),
    *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
FROM_ONE = np.array([1, 1, 0, 0])
"""From our coordinates to VOC's."""


def annotation(size, boxes, classes, difficult=None, crowd=None, areas=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    n = len(boxes)
    plain = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return Annotation(
        size=size,
        boxes=boxes,
        classes=np.array(classes, np.int32).reshape(n),
        difficult=np.array(difficult if difficult is not None else [False] * n, bool),
        crowd=np.array(crowd if crowd is not None else [False] * n, bool),
        areas=np.array(plain if areas is None else areas, np.float32),
    )


def made_up(seed, images=12, num_classes=4, crowds=False):
    """Images with up to eight objects; some have none."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(images):
        n = int(rng.integers(0, 9))
        low = rng.integers(0, 300, (n, 2))
        boxes = np.concatenate([low, low + rng.integers(1, 150, (n, 2))], 1)
        boxes = boxes + (rng.random((n, 4)) if crowds else 0)
        marks = rng.random(n) < 0.2
        plain = np.prod(boxes[:, 2:] - boxes[:, :2], 1)
        found.append(
            annotation(
                (450, 450),
                boxes,
                rng.integers(0, num_classes, n),
                **({"crowd": marks} if crowds else {"difficult": marks}),
                areas=plain * rng.uniform(0.4, 1, n) if crowds else None,
            )
        )
    return found


def detected(annotations, num_classes, seed, digits=None, false_ones=3):
    """Objects moved a little, missed or found twice, and others that are not there."""
    rng = np.random.default_rng(seed)
    found = []
    for each in annotations:
        times = rng.choice(4, len(each.boxes), p=[0.15, 0.55, 0.2, 0.1])
        boxes = np.repeat(each.boxes, times, 0).astype(np.float64)
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        boxes += sides * rng.normal(0, 0.12, boxes.shape)
        classes = np.repeat(each.classes, times)
        confused = rng.random(len(classes)) < 0.1
        classes[confused] = rng.integers(0, num_classes, confused.sum())
        low = rng.uniform(0, 300, (false_ones, 2))
        others = np.concatenate([low, low + rng.uniform(1, 150, (false_ones, 2))], 1)
        boxes = np.concatenate([boxes, others])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 0.01)
        classes = np.concatenate([classes, rng.integers(0, num_classes, false_ones)])
        scores = rng.beta(2, 2, len(boxes))
        scores = scores if digits is None else scores.round(digits)
        found.append(Detections(boxes, scores, classes))
    return found


def data_folder():
    """The folder of real data, or a skip."""
    folder = os.environ.get("RESNET_JAX_DETECTION_DATA")
    if folder is None:
        pytest.skip("RESNET_JAX_DETECTION_DATA names no folder with real data")
    return Path(folder)


def voc_objects():
    """The annotations of the VOC 2007 test set, by name."""
    folder = data_folder() / "voc07test"
    names = (folder / "ImageSets/Main/test.txt").read_text().split()
    found = {}
    for name in names:
        root = ET.parse(folder / "Annotations" / f"{name}.xml").getroot()
        objects = root.findall("object")
        corners = [
            [
                float(o.find(f"bndbox/{side}").text)
                for side in ("xmin", "ymin", "xmax", "ymax")
            ]
            for o in objects
        ]
        found[name] = annotation(
            tuple(int(root.find(f"size/{side}").text) for side in ("height", "width")),
            np.array(corners).reshape(-1, 4) - FROM_ONE,
            [VOC.index(o.find("name").text) for o in objects],
            difficult=[o.find("difficult").text == "1" for o in objects],
        )
    return found


def coco_content():
    """The parsed JSON of COCO in small."""
    file = data_folder() / "coco-small/annotations/instances_train2017.json"
    return json.loads(file.read_text())


def coco_objects(content):
    """Its annotations, in the order of the images' numbers, and the category ids."""
    ids = sorted(category["id"] for category in content["categories"])
    by_image = {image["id"]: [] for image in content["images"]}
    for item in content["annotations"]:
        by_image[item["image_id"]].append(item)
    sizes = {
        image["id"]: (image["height"], image["width"]) for image in content["images"]
    }
    found = []
    for image in sorted(by_image):
        items = by_image[image]
        boxes = np.array([item["bbox"] for item in items]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.append(
            annotation(
                sizes[image],
                boxes,
                [ids.index(item["category_id"]) for item in items],
                crowd=[item["iscrowd"] == 1 for item in items],
                areas=[item["area"] for item in items],
            )
        )
    return found, ids
