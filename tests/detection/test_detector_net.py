"""The whole net: images in padded batches, its parts, precision and options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import create_model
from resnet_jax.config import DetectionConfig, resolve
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.detection.faster_rcnn import (
    make_detector,
    prepared,
    proposals_of,
)
from resnet_jax.detection.inference import detections_of
from resnet_jax.errors import UserError
from tests.detection.tiny import SAME, batch_of_four, tiny_config

HALF = PixelStatistics(np.full((1, 1, 3), 0.5), np.full((1, 1, 3), 0.25))


def random_variables(model, seed=0):
    """Variables with statistics that are not those of a fresh net."""
    sizes = jnp.full((1, 2), 64)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)), sizes
    )
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "var" in name or "scale" in name:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan_in = max(1, np.prod(leaf.shape[:-1]))
        return rng.normal(0, 1 / np.sqrt(fan_in), leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def net():
    model = make_detector(tiny_config("unused"), num_classes=2)
    return model, random_variables(model)


def program(model):
    def run(variables, images, sizes):
        return detections_of([model], [variables], [SAME], [(images, sizes)])

    return jax.jit(run)


def padded(image, height, width, fill):
    batch = np.full((1, height, width, 3), fill, np.float32)
    batch[0, : image.shape[0], : image.shape[1]] = image
    return batch


@pytest.mark.parametrize("name", ["resnet10t", "vgg16"])
def test_an_image_alone_is_the_image_in_any_bucket(name):
    """The map and the proposals are equal up to the rounding of other shapes."""
    config = tiny_config("unused", **{"model.name": name, "model.width": None})
    model = make_detector(config, num_classes=2)
    if name == "vgg16":  # of the same depth, but narrow
        backbone = model.backbone
        narrow = backbone.trunk.clone(widths=(8, 8, 16, 16, 16))
        tail = backbone.tail.clone(features=16)
        backbone = dataclasses.replace(backbone, trunk=narrow, tail=tail)
        model = model.clone(backbone=backbone)
    variables = random_variables(model)
    image = np.random.default_rng(1).normal(size=(41, 70, 3)).astype(np.float32)
    sizes = np.array([[41, 70]], np.int32)

    @jax.jit
    def run(images):
        bound = model.bind(variables)
        maps = bound.features(images, sizes)
        return maps, proposals_of(bound, maps, sizes)

    alone, wanted = run(padded(image, 48, 80, 0))
    for shape, fill in (((64, 96), 7.0), ((112, 80), np.nan)):
        maps, found = run(padded(image, *shape, fill))
        there = maps[:, : alone.shape[1], : alone.shape[2]]
        np.testing.assert_allclose(there, alone, rtol=1e-4, atol=1e-4)
        assert not maps[:, alone.shape[1] :].any()
        np.testing.assert_array_equal(found.valid, wanted.valid)
        np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-3)


def test_detections_do_not_depend_on_the_bucket(net):
    model, variables = net
    rng = np.random.default_rng(2)
    image = rng.normal(size=(50, 64, 3)).astype(np.float32)
    other = rng.normal(size=(96, 96, 3)).astype(np.float32)
    run = program(model)
    alone = run(variables, padded(image, 64, 64, 0), np.array([[50, 64]]))
    both = np.concatenate([padded(image, 96, 96, 9), other[None]])
    together = run(variables, both, np.array([[50, 64], [96, 96]]))
    assert int(alone.valid.sum()) > 3
    for name in ("valid", "classes"):
        np.testing.assert_array_equal(
            getattr(together, name)[0], getattr(alone, name)[0]
        )
    np.testing.assert_allclose(together.boxes[0], alone.boxes[0], atol=1e-2)
    np.testing.assert_allclose(together.scores[0], alone.scores[0], atol=1e-4)


def test_bfloat16_moves_boxes_by_less_than_half_a_pixel(net):
    """The same regions, classified in bfloat16."""
    model, variables = net
    batch = batch_of_four()
    images, sizes = prepared(jnp.asarray(batch["images"]), HALF), batch["sizes"]
    wide = tiny_config("unused", **{"model.dtype": "bfloat16"})
    narrow = make_detector(wide, num_classes=2)

    @functools.partial(jax.jit, static_argnums=0)
    def deltas(model):
        bound = model.bind(variables)
        maps = bound.features(images, sizes)
        return bound.classify(maps, jnp.asarray(batch["boxes"]), sizes)[1]

    # Deltas of a tenth of a region's side, over 40 pixels.
    moved = np.abs(np.float32(deltas(model)) - np.float32(deltas(narrow)))
    assert moved.max() / 10 * 40 < 0.5


def test_the_variables_are_those_of_the_classifier(net):
    _, variables = net
    classifier = create_model("resnet10t", num_classes=None).clone(width=16)
    images = jnp.zeros((1, 64, 64, 3))
    shapes = jax.eval_shape(classifier.init, jax.random.key(0), images)
    for kind in ("params", "batch_stats"):
        for part, tree in shapes[kind].items():
            found = jax.tree.map(np.shape, variables[kind][part])
            assert found == jax.tree.map(np.shape, tree)
    assert set(variables["params"]) - set(shapes["params"]) == {"rpn", "head"}


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (4, 3, 2, 4)),
        ({"detector.class_agnostic": True}, (4, 3, 1, 4)),
        ({"detector.context": True}, (4, 3, 2, 4)),
        ({"detector.roi_pooling": "max"}, (4, 3, 2, 4)),
        ({"model.name": "plain18"}, (4, 3, 2, 4)),
        ({"model.name": "resnet26"}, (4, 3, 2, 4)),
    ],
)
def test_the_outputs_of_the_options(options, shape):
    config = tiny_config("unused", **options)
    model = make_detector(config, num_classes=2)

    def run(key):
        images, sizes = jnp.zeros((4, 64, 96, 3)), jnp.full((4, 2), 64)
        variables = model.init(key, images, sizes)
        bound = model.bind(variables)
        maps = bound.features(images, sizes)
        return bound.classify(maps, jnp.zeros((4, 3, 4)), sizes)

    logits, deltas = jax.eval_shape(run, jax.random.key(0))
    assert logits.shape == (4, 3, 3)
    assert deltas.shape == shape
    assert logits.dtype == deltas.dtype == np.float32


def test_the_context_is_the_whole_image(net):
    """A region's context equals the feature of a region over the whole image."""
    model, variables = net
    model = model.clone(
        config=tiny_config("unused", **{"detector.context": True}).detector
    )
    images = np.random.default_rng(3).normal(size=(1, 64, 96, 3)).astype(np.float32)
    sizes = np.array([[64, 90]])
    boxes = np.array([[[3, 5, 40, 50], [0, 0, 90, 64]]], np.float32)

    @jax.jit
    def features():
        bound = model.bind(variables)
        return bound.region_features(bound.features(images, sizes), boxes, sizes)

    own, context = np.split(np.asarray(features()), 2, axis=-1)
    np.testing.assert_allclose(context[0, 0], context[0, 1])
    np.testing.assert_allclose(context[0, 0], own[0, 1], rtol=1e-5, atol=1e-6)
    assert np.abs(own[0, 0] - own[0, 1]).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model.name": "cifar_resnet20"}, "no map of stride 16"),
        ({"model.name": "vgg16"}, "model.width is for residual"),
        ({"model.frozen": ("stem",)}, "freeze random weights"),
        ({"model.frozen_statistics": True}, "needs model.weights"),
        ({"detector.roi_low": 0.6}, "detector.roi_low=0.6 is above"),
        ({"training.procedure": "fast_rcnn"}, "training.proposals"),
        ({"schedule.kind": "plateau"}, "held-out"),
        ({"seeds": 2, "training.procedure": "rpn"}, "compares precisions"),
    ],
)
def test_what_does_not_fit_gets_a_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        make_detector(tiny_config("unused", **options), num_classes=2)


def test_a_classifiers_config_is_none_of_a_detector():
    with pytest.raises(UserError, match="config of a classifier"):
        resolve({"loss": {"kind": "softmax"}}, DetectionConfig)
    with pytest.raises(UserError, match="config of a detector"):
        resolve({"detector": {"nms": 0.5}})
