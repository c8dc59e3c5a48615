"""Detectors of torchvision and Detectron2, from files with their names and shapes."""

import re

import jax
import numpy as np
import pytest
from flax import traverse_util

from resnet_jax.data.transforms import normalize, to_unit
from resnet_jax.detection.weights import read_detector
from resnet_jax.errors import UserError
from resnet_jax.weights.files import write_safetensors

NUM_CLASSES = 2


def net_arrays(sizes, bottleneck):
    """A residual net of torchvision, from its definition: random arrays by name."""
    rng = np.random.default_rng(0)
    arrays = {}

    def conv(name, norm, *shape):
        arrays[f"{name}.weight"] = rng.random(shape, np.float32)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            arrays[f"{norm}.{leaf}"] = rng.random(shape[0], np.float32)

    conv("conv1", "bn1", 64, 3, 7, 7)
    ins = 64
    for stage, size in enumerate(sizes):
        inner = 64 * 2**stage
        out = inner * (4 if bottleneck else 1)
        kernels = [(1, inner), (3, inner), (1, out)]
        if not bottleneck:
            kernels = [(3, inner), (3, out)]
        for block in range(size):
            name = f"layer{stage + 1}.{block}"
            if block == 0 and ins != out:
                conv(f"{name}.downsample.0", f"{name}.downsample.1", out, ins, 1, 1)
            for place, (side, outs) in enumerate(kernels, 1):
                conv(f"{name}.conv{place}", f"{name}.bn{place}", outs, ins, side, side)
                ins = outs
    return arrays


def layer_arrays(channels, features, per_cell, background_first=False, boxes=None):
    """The detector's own layers: {(layer, leaf): array}."""
    rng = np.random.default_rng(1)
    rows = NUM_CLASSES + background_first
    shapes = {
        "conv": (64, channels, 3, 3),
        "objectness": (per_cell, 64, 1, 1),
        "deltas": (4 * per_cell, 64, 1, 1),
        "classes": (NUM_CLASSES + 1, features),
        "boxes": (boxes or 4 * rows, features),
    }
    return {
        (layer, leaf): rng.random(shape if leaf == "weight" else shape[:1], np.float32)
        for layer, shape in shapes.items()
        for leaf in ("weight", "bias")
    }


DETECTRON2_LAYERS = {
    "conv": "proposal_generator.rpn_head.conv",
    "objectness": "proposal_generator.rpn_head.objectness_logits",
    "deltas": "proposal_generator.rpn_head.anchor_deltas",
    "classes": "roi_heads.box_predictor.cls_score",
    "boxes": "roi_heads.box_predictor.bbox_pred",
}
TORCHVISION_LAYERS = {
    "conv": "rpn.head.conv.0.0",
    "objectness": "rpn.head.cls_logits",
    "deltas": "rpn.head.bbox_pred",
    "classes": "roi_heads.box_predictor.cls_score",
    "boxes": "roi_heads.box_predictor.bbox_pred",
}


def detectron2_name(name):
    """The name that Detectron2 has for torchvision's."""
    if name.startswith(("conv1", "bn1")):
        return "backbone.stem." + name.replace("bn1", "conv1.norm")
    stage = int(name[5])
    name = re.sub(r"\.bn(\d)", r".conv\1.norm", name[6:])
    name = name.replace("downsample.0", "shortcut")
    name = name.replace("downsample.1", "shortcut.norm")
    return f"{'roi_heads' if stage == 4 else 'backbone'}.res{stage + 1}{name}"


def sequential_name(name):
    """A Sequential of conv1 to layer3; another of layer4 and the pooling."""
    part, rest = name.split(".", 1)
    if part == "layer4":
        return f"roi_heads.box_head.0.{rest}"
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6}
    return f"backbone.{places[part]}.{rest}"


def named_name(name):
    """Modules with names, as IntermediateLayerGetter keeps them."""
    head = name.startswith("layer4")
    return f"roi_heads.box_head.{name}" if head else f"backbone.body.{name}"


def in_layout(net, layers, rename, layer_names):
    arrays = {rename(name): array for name, array in net.items()}
    for (layer, leaf), array in layers.items():
        arrays[f"{layer_names[layer]}.{leaf}"] = array
    return arrays


def read(folder, arrays):
    write_safetensors(folder / "detector.safetensors", arrays)
    return read_detector(folder / "detector.safetensors")


@pytest.fixture(scope="module")
def resnet18():
    return net_arrays((2, 2, 2, 2), bottleneck=False)


def test_detectron2(tmp_path):
    net = net_arrays((3, 4, 6, 3), bottleneck=True)
    layers = layer_arrays(1024, 2048, 15)
    arrays = in_layout(net, layers, detectron2_name, DETECTRON2_LAYERS)
    arrays["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((15, 4))
    arrays["roi_heads.mask_head.deconv.bias"] = np.zeros(3, np.float32)
    found = read(tmp_path, arrays)

    model, detector = found.config.model, found.config.detector
    assert (model.name, model.stride_version) == ("resnet50", "v1")
    assert found.num_classes == NUM_CLASSES
    assert detector.anchor_sizes == (32, 64, 128, 256, 512)
    assert (detector.anchor_order, detector.anchor_rounding) == ("size", False)
    assert (detector.rpn_features, detector.class_agnostic) == (64, False)

    ours = {
        name: np.asarray(leaf)
        for name, leaf in traverse_util.flatten_dict(found.variables, sep="/").items()
    }
    assert len(ours) == len(net) + len(layers)
    for ours_name, name in {
        "params/stage1/block1/conv1/kernel": "layer1.0.conv1.weight",
        "params/stage2/block4/conv2/kernel": "layer2.3.conv2.weight",
        "params/stage3/block1/shortcut_conv/kernel": "layer3.0.downsample.0.weight",
        "params/stage3/block1/shortcut_norm/scale": "layer3.0.downsample.1.weight",
        "params/stage4/block3/norm3/bias": "layer4.2.bn3.bias",
        "batch_stats/stage4/block1/norm2/mean": "layer4.0.bn2.running_mean",
        "batch_stats/stem/norm/var": "bn1.running_var",
    }.items():
        theirs = net[name]
        theirs = theirs.transpose(2, 3, 1, 0) if theirs.ndim == 4 else theirs
        np.testing.assert_array_equal(ours[ours_name], theirs)
    for name, key in {
        "rpn/conv": "conv",
        "rpn/objectness": "objectness",
        "rpn/deltas": "deltas",
        "head/classes": "classes",
        "head/boxes": "boxes",
    }.items():
        kernel, bias = layers[key, "weight"], layers[key, "bias"]
        kernel = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
        np.testing.assert_array_equal(ours[f"params/{name}/kernel"], kernel)
        np.testing.assert_array_equal(ours[f"params/{name}/bias"], bias)

    # The same response of the first kernels to a patch, which Detectron2 takes in BGR.
    patch = np.random.default_rng(2).integers(0, 256, (7, 7, 3), np.uint8)
    blue_first = patch[..., ::-1] - np.array([103.53, 116.28, 123.675])
    expected = np.einsum("ochw,hwc->o", net["conv1.weight"], blue_first)
    normal = normalize(to_unit(patch[None]), found.statistics)[0]
    response = np.einsum("hwco,hwc->o", ours["params/stem/conv/kernel"], normal)
    np.testing.assert_allclose(response, expected, rtol=1e-4)


@pytest.mark.parametrize("rename", [sequential_name, named_name])
def test_torchvision(resnet18, rename, tmp_path):
    layers = layer_arrays(256, 512, 9, background_first=True)
    arrays = in_layout(resnet18, layers, rename, TORCHVISION_LAYERS)
    if rename is named_name:  # the name before torchvision 0.13
        for leaf in ("weight", "bias"):
            arrays[f"rpn.head.conv.{leaf}"] = arrays.pop(f"rpn.head.conv.0.0.{leaf}")
    found = read(tmp_path, {f"module.{name}": a for name, a in arrays.items()})
    model, detector = found.config.model, found.config.detector
    assert (model.name, model.stride_version) == ("resnet18", None)
    assert detector.anchor_sizes == (128, 256, 512)
    assert (detector.anchor_order, detector.anchor_rounding) == ("ratio", True)
    assert found.num_classes == NUM_CLASSES

    params = found.variables["params"]
    for place, name in ((1, "layer1.1.conv2.weight"), (4, "layer4.1.conv2.weight")):
        theirs = resnet18[name].transpose(2, 3, 1, 0)
        ours = params[f"stage{place}"]["block2"]["conv2"]["kernel"]
        np.testing.assert_array_equal(ours, theirs)
    # Background is torchvision's first class and our last; no box belongs to it.
    kernel, bias = layers["classes", "weight"].T, layers["classes", "bias"]
    np.testing.assert_array_equal(
        params["head"]["classes"]["kernel"][:, -1], kernel[:, 0]
    )
    np.testing.assert_array_equal(params["head"]["classes"]["bias"][:-1], bias[1:])
    boxes = layers["boxes", "weight"].T
    np.testing.assert_array_equal(params["head"]["boxes"]["kernel"], boxes[:, 4:])


def test_one_box_for_all_classes(resnet18, tmp_path):
    layers = layer_arrays(256, 512, 9, boxes=4)
    arrays = in_layout(resnet18, layers, detectron2_name, DETECTRON2_LAYERS)
    arrays["pixel_mean"] = np.array([1, 2, 3], np.float32).reshape(3, 1, 1)
    found = read(tmp_path, arrays)
    assert found.config.detector.class_agnostic
    # Its own pixels; a basic block has no choice of strides.
    np.testing.assert_allclose(np.ravel(found.statistics.mean) * 255, [3, 2, 1])
    assert found.config.model.stride_version is None
    shapes = jax.tree.map(np.shape, found.variables["params"]["head"]["boxes"])
    assert shapes == {"kernel": (512, 4), "bias": (4,)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backbone.fpn.inner.weight": 1}, "has a feature pyramid"),
        ({"backbone.res6.weight": 1}, "unknown array backbone.res6.weight"),
        ({"proposal_generator.rpn_head.conv.bias": None}, "lacks rpn.conv.bias"),
        ({"roi_heads.box_predictor.cls_score.weight": None}, "lacks head.classes"),
        ({"backbone.res2.1.conv1.weight": None}, "backbone of 2-2-2-2 blocks"),
        (
            {"proposal_generator.rpn_head.objectness_logits.weight": 7},
            "has 7 anchors a cell",
        ),
    ],
)
def test_other_files_are_refused(changes, sentence, resnet18, tmp_path):
    layers = layer_arrays(256, 512, 9)
    arrays = in_layout(resnet18, layers, detectron2_name, DETECTRON2_LAYERS)
    for name, rows in changes.items():
        arrays[name] = np.zeros((rows or 0, 64, 1, 1), np.float32)
        if rows is None:
            del arrays[name]
    with pytest.raises(UserError, match=sentence):
        read(tmp_path, arrays)


def test_a_classifier_is_refused(resnet18, tmp_path):
    with pytest.raises(UserError, match="no Faster R-CNN on one map"):
        read(tmp_path, resnet18)
