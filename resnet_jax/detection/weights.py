"""Detectors that torchvision or Detectron2 trained, read as ours.

Both name the same layers otherwise, and differ in what a file does not say: the colours
and scale of pixels, the anchors, where a bottleneck strides. ``read_detector`` returns
all of it.
"""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from resnet_jax.config import DetectionConfig
from resnet_jax.config.detection import (
    BackboneConfig,
    DetectionDataConfig,
    DetectorConfig,
)
from resnet_jax.data.split import IMAGENET_MEAN, IMAGENET_STD
from resnet_jax.data.transforms import MAX_PIXEL, PixelStatistics
from resnet_jax.detection.faster_rcnn import FasterRCNN, make_detector
from resnet_jax.errors import UserError
from resnet_jax.models.catalog import CATALOG
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights import shapes
from resnet_jax.weights.files import read_arrays
from resnet_jax.weights.hub import locate
from resnet_jax.weights.load_save import checked_array
from resnet_jax.weights.torch_files import printable
from resnet_jax.weights.torch_layout import COUNTER, StoredArray, torch_layout

# Names in the files, and the names that the layers have in a classifier of torchvision
# or, for the detector's own layers, here.
_TORCHVISION = (
    (r"backbone\.(?:body\.)?((?:conv1|bn1|layer[123])\..+)", r"\1"),
    # The same parts in a Sequential, whose places 2 and 3 are the ReLU and the pooling.
    (r"backbone\.(?:body\.)?0\.(.+)", r"conv1.\1"),
    (r"backbone\.(?:body\.)?1\.(.+)", r"bn1.\1"),
    (r"backbone\.(?:body\.)?4\.(.+)", r"layer1.\1"),
    (r"backbone\.(?:body\.)?5\.(.+)", r"layer2.\1"),
    (r"backbone\.(?:body\.)?6\.(.+)", r"layer3.\1"),
    (r"roi_heads\.box_head\.\w+\.(\d+\..+)", r"layer4.\1"),
    (r"rpn\.head\.conv\.(?:0\.0\.)?(\w+)", r"rpn.conv.\1"),
    (r"rpn\.head\.cls_logits\.(\w+)", r"rpn.objectness.\1"),
    (r"rpn\.head\.bbox_pred\.(\w+)", r"rpn.deltas.\1"),
    (r"roi_heads\.box_predictor\.cls_score\.(\w+)", r"head.classes.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(\w+)", r"head.boxes.\1"),
)
_DETECTRON2 = (
    (r"backbone\.stem\.conv1\.norm\.(.+)", r"bn1.\1"),
    (r"backbone\.stem\.(conv1\.weight)", r"\1"),
    (r"backbone\.res2\.(.+)", r"layer1.\1"),
    (r"backbone\.res3\.(.+)", r"layer2.\1"),
    (r"backbone\.res4\.(.+)", r"layer3.\1"),
    (r"roi_heads\.res5\.(.+)", r"layer4.\1"),
    (r"proposal_generator\.rpn_head\.conv\.(\w+)", r"rpn.conv.\1"),
    (r"proposal_generator\.rpn_head\.objectness_logits\.(\w+)", r"rpn.objectness.\1"),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(\w+)", r"rpn.deltas.\1"),
    (r"roi_heads\.box_predictor\.cls_score\.(\w+)", r"head.classes.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(\w+)", r"head.boxes.\1"),
)
# Within a block of Detectron2.
_DETECTRON2_BLOCK = (
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", r".downsample.1."),
    (r"\.shortcut\.", r".downsample.0."),
)
# Not part of a box detector: counters, anchors, and heads for masks and keypoints.
_UNUSED = re.compile(
    rf".*\.{COUNTER}|.*anchor_generator\..*|roi_heads\.(mask|keypoint)_.*"
)

_STAGES = (1, 2, 3, 4)
_OWN = ("params/rpn/", "params/head/")

# Sizes of the anchors by their number in a cell, in three ratios.
_ANCHOR_SIZES = {
    9: (128.0, 256.0, 512.0),
    12: (64.0, 128.0, 256.0, 512.0),
    15: (32.0, 64.0, 128.0, 256.0, 512.0),
}

# Detectron2's pixels unless the file has its own: the mean of the authors' networks, in
# the order blue, green, red, and no scale.
_BGR_MEAN = np.array([103.53, 116.28, 123.675], np.float32)
_BGR_STD = np.ones(3, np.float32)

# What both test with.
_PUBLISHED: dict[str, Any] = {
    "border_anchors": True,
    "smallest_proposal": 0.0,
    "test_proposals": 1000,
    "roi_low": 0.0,
    "nms": 0.5,
}


class ReadDetector(NamedTuple):
    """A detector of a file.

    ``make_detector(config, num_classes)`` makes the net.

    Attributes:
      config: of the net and of the images that it was trained on, and else the
        defaults.
      num_classes: K, without the background.
      variables: params and batch_stats, float32.
      statistics: of its pixels in [0, 1], red first.
    """

    config: DetectionConfig
    num_classes: int
    variables: dict[str, Any]
    statistics: PixelStatistics


def holds_detector(path_or_name: str | os.PathLike[str]) -> bool:
    """Whether a file's arrays are those of a detector, not of a classifier alone."""
    arrays, _ = read_arrays(locate(os.fspath(path_or_name)))
    return any("rpn" in name for name in arrays)


def read_detector(path_or_name: str | os.PathLike[str]) -> ReadDetector:
    """Reads a Faster R-CNN on one map, of torchvision or Detectron2.

    - torchvision: a ``FasterRCNN`` put together from conv1 to layer3 as backbone and
      layer4 as box head. It ships none without a feature pyramid.
    - Detectron2: the C4 models of its zoo, saved by torch or as safetensors. Blue comes
      first there, and bottlenecks stride in their first 1x1 convolution. Its
      adaptive number of samples a bin becomes 2 x 2, so scores differ a little.

    Args:
      path_or_name: a safetensors or torch.save file, or a name of ``locate``.

    Raises:
      UserError: the file cannot be read, has another layout, or another net than
        residual ones of the catalog.
    """
    source = os.fspath(path_or_name)
    arrays, _ = read_arrays(locate(source))
    is_detectron2 = any("proposal_generator." in name for name in arrays)
    if any("fpn" in name for name in arrays):
        raise UserError(
            f"{source} has a feature pyramid, but this library's detectors have one "
            "map: give a C4 model"
        )
    statistics = _statistics(arrays, is_detectron2)
    arrays = _renamed(source, arrays, is_detectron2)
    arrays = _ours(arrays, is_detectron2)
    config, num_classes = _config(source, arrays, is_detectron2)
    variables = _variables(source, arrays, make_detector(config, num_classes))
    return ReadDetector(config, num_classes, variables, statistics)


def _renamed(
    source: str, arrays: Mapping[str, np.ndarray], is_detectron2: bool
) -> dict[str, np.ndarray]:
    """The arrays by common names."""
    table = _DETECTRON2 if is_detectron2 else _TORCHVISION
    renamed, unknown = {}, []
    for name, array in arrays.items():
        plain = re.sub(r"^(module\.|model\.|_orig_mod\.)+", "", name)
        if _UNUSED.fullmatch(plain) or plain in ("pixel_mean", "pixel_std"):
            continue
        for pattern, common in table:
            if match := re.fullmatch(pattern, plain):
                renamed[match.expand(common)] = array
                break
        else:
            unknown.append(name)
    if is_detectron2:
        for pattern, common in _DETECTRON2_BLOCK:
            renamed = {re.sub(pattern, common, n): a for n, a in renamed.items()}
    needed = {"conv1.weight", "rpn.objectness.weight", "head.classes.weight"}
    needed |= {"head.boxes.weight", "rpn.conv.weight", "layer1.0.conv1.weight"}
    if unknown or not needed <= renamed.keys():
        what = f"has an unknown array {printable(unknown[0])}" if unknown else ""
        what = what or f"lacks {min(needed - renamed.keys())}"
        raise UserError(
            f"{source} is no Faster R-CNN on one map: it {what}; give one of "
            "torchvision with the backbone conv1 to layer3 and the box head layer4, or "
            "a C4 model of Detectron2"
        )
    return renamed


def _ours(arrays: dict[str, np.ndarray], is_detectron2: bool) -> dict[str, np.ndarray]:
    """The arrays for red before blue, and for a background that comes last."""
    moved = dict(arrays)
    if is_detectron2:
        moved["conv1.weight"] = arrays["conv1.weight"][:, ::-1]
        return moved
    for leaf in ("weight", "bias"):
        moved[f"head.classes.{leaf}"] = np.roll(arrays[f"head.classes.{leaf}"], -1, 0)
        moved[f"head.boxes.{leaf}"] = arrays[f"head.boxes.{leaf}"][4:]
    return moved


def _config(
    source: str, arrays: Mapping[str, np.ndarray], is_detectron2: bool
) -> tuple[DetectionConfig, int]:
    """The config of a file's net, and its classes."""
    per_cell = len(arrays["rpn.objectness.weight"])
    if per_cell not in _ANCHOR_SIZES:
        raise UserError(
            f"{source} has {per_cell} anchors a cell; known are "
            f"{', '.join(map(str, _ANCHOR_SIZES))}"
        )
    strides_first = is_detectron2 and "layer1.0.conv3.weight" in arrays
    num_classes = len(arrays["head.classes.weight"]) - 1
    detector = DetectorConfig(
        anchor_sizes=_ANCHOR_SIZES[per_cell],
        anchor_rounding=not is_detectron2,
        anchor_order="size" if is_detectron2 else "ratio",
        rpn_features=len(arrays["rpn.conv.weight"]),
        roi_pooling="align" if is_detectron2 else "align_v1",
        class_agnostic=len(arrays["head.boxes.weight"]) == 4 < 4 * num_classes,
        test_candidates=6000 if is_detectron2 else 1000,
        **_PUBLISHED,
    )
    config = DetectionConfig(
        model=BackboneConfig(
            name=_net(source, arrays), stride_version="v1" if strides_first else None
        ),
        detector=detector,
        data=DetectionDataConfig(shorter_side=800, longer_side=1333),
    )
    return config, num_classes


def _net(source: str, arrays: Mapping[str, np.ndarray]) -> str:
    """The name of the net whose arrays a file has."""
    blocks = {m[0] for n in arrays if (m := re.match(r"layer[1-4]\.\d+\.", n))}
    sizes = [sum(b.startswith(f"layer{stage}.") for b in blocks) for stage in _STAGES]
    body = {n: a for n, a in arrays.items() if not n.startswith(("rpn.", "head."))}
    for name, entry in CATALOG.items():
        net = entry.net
        if type(net) is not ResNet or list(net.stage_sizes) != sizes:
            continue
        net = net.clone(num_classes=None)
        try:
            table = torch_layout(net, shapes.abstract_arrays(net))
        except UserError:
            continue
        expected = {stored.key: stored for stored in table.values()}
        if not shapes.differing(expected, body):
            return name
    raise UserError(
        f"{source} has a backbone of {'-'.join(map(str, sizes))} blocks that is no net "
        "of this library; see resnet_jax.list_models()"
    )


def _variables(
    source: str, arrays: Mapping[str, np.ndarray], model: FasterRCNN
) -> dict[str, Any]:
    """The tree of variables of a model."""
    images, sizes = jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64)
    tree = jax.eval_shape(model.init, jax.random.key(0), images, sizes)
    expected = traverse_util.flatten_dict(dict(tree), sep="/")
    own = {n: a for n, a in expected.items() if n.startswith(_OWN)}
    shared = {n: a for n, a in expected.items() if n not in own}
    table = torch_layout(model.backbone.net, shared)
    table |= {name: _stored(name, tuple(array.shape)) for name, array in own.items()}
    in_file = {stored.key: stored for stored in table.values()}
    if difference := shapes.differences(in_file, arrays):
        raise UserError(
            f"{source} is no Faster R-CNN of one head: {difference}; give a file of "
            "torchvision or Detectron2 as it was saved"
        )
    loaded = {
        name: jnp.asarray(
            stored.from_file(
                checked_array(
                    source, stored.key, arrays[stored.key], expected[name].dtype
                )
            )
        )
        for name, stored in table.items()
    }
    return traverse_util.unflatten_dict(loaded, sep="/")


def _stored(name: str, shape: tuple[int, ...]) -> StoredArray:
    """How a file stores an array of the RPN or the head."""
    _, part, layer, leaf = name.split("/")
    key = f"{part}.{layer}.{'weight' if leaf == 'kernel' else leaf}"
    if leaf == "bias":
        return StoredArray.unchanged(key, shape)
    axes = (3, 2, 0, 1) if len(shape) == 4 else (1, 0)
    return StoredArray(key, tuple(shape[axis] for axis in axes), shape, shape, axes)


def _statistics(
    arrays: Mapping[str, np.ndarray], is_detectron2: bool
) -> PixelStatistics:
    """Of pixels in [0, 1], red first."""
    mean: np.ndarray = IMAGENET_MEAN
    std: np.ndarray = IMAGENET_STD
    if is_detectron2:
        mean = arrays.get("pixel_mean", _BGR_MEAN).reshape(3)[::-1] / MAX_PIXEL
        std = arrays.get("pixel_std", _BGR_STD).reshape(3)[::-1] / MAX_PIXEL
    return PixelStatistics(
        *(part.astype(np.float32).reshape(1, 1, 3) for part in (mean, std))
    )
