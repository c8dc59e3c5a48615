"""Detections with the improvements of appendix B, against the same steps by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.config import DetectionConfig
from resnet_jax.config.detection import (
    BackboneConfig,
    DetectorConfig,
)
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.detection.faster_rcnn import make_detector, prepared, proposals_of
from resnet_jax.detection.head import decode_regions, detect
from resnet_jax.detection.inference import detections_of
from tests.detection.test_improvements import overlap, scales_loop, vote_loop

DETECTOR = DetectorConfig(
    anchor_sizes=(24.0, 48.0),
    rpn_features=8,
    smallest_proposal=4.0,
    test_candidates=60,
    test_proposals=8,
    roi_size=3,
    detections=12,
    score_threshold=0.1,
)
SIZES = np.array([[60, 90], [64, 75]], np.int32)
STATISTICS = PixelStatistics(*np.full((2, 1, 1, 3), 0.5, np.float32))
K = 3


def detector(seed=0, **fields):
    """A small net with random weights and statistics, its variables, and a config."""
    config = dataclasses.replace(DETECTOR, **fields)
    whole = DetectionConfig(
        model=BackboneConfig(name="resnet18", width=4), detector=config
    )
    model = make_detector(whole, K)
    images = jnp.zeros((1, 64, 96, 3))
    variables = jax.jit(model.init)(jax.random.key(seed), images, SIZES[:1])
    params = variables["params"]
    rng = np.random.default_rng(seed)
    for part, name, scale in (
        ("head", "classes", 0.2),
        ("head", "boxes", 0.5),
        ("rpn", "objectness", 0.3),
        ("rpn", "deltas", 0.3),
    ):
        kernel = params[part][name]["kernel"]
        params[part][name]["kernel"] = rng.normal(0, scale, kernel.shape)
    return model, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)


def pictures(*sides, seed=7):
    """Two pictures at several shorter sides, padded: the scales of a batch."""
    rng = np.random.default_rng(seed)
    scales = []
    for side in sides:
        sizes = np.round(SIZES * side / 64).astype(np.int32)
        shape = (2, -(-side // 16) * 16, -(-side * 3 // 32) * 16, 3)
        scales.append((rng.integers(0, 256, shape, dtype=np.uint8), sizes))
    return scales


def run(models, scales, base=0):
    nets, variables = zip(*models, strict=True)
    call = functools.partial(detections_of, nets, base=base)
    return jax.jit(call)(variables, [STATISTICS] * len(nets), scales)


def call(member, function, *arguments):
    """A function of a bound net and arrays, compiled: op by op takes long."""
    model, variables = member
    bound = jax.jit(lambda values, *rest: function(model.bind(values), *rest))
    return bound(variables, *arguments)


def map_of(member, scale):
    return call(
        member, lambda net, x, s: net.features(prepared(x, STATISTICS), s), *scale
    )


def classified(member, maps, boxes, sizes):
    """Probabilities and boxes of regions, as a detector computes them alone."""

    def function(net, maps, boxes, sizes):
        logits, deltas = net.classify(maps, boxes, sizes)
        return jax.nn.softmax(logits), decoded(deltas, boxes, sizes)

    return call(member, function, maps, boxes, sizes)


def decoded(deltas, boxes, sizes):
    decode = functools.partial(decode_regions, num_classes=K)
    return jax.vmap(decode)(deltas, boxes, sizes)


def assert_same(found, expected, atol=0.02):
    there = np.array(expected.valid)
    np.testing.assert_array_equal(found.valid, there)
    assert there.any(axis=1).all()
    np.testing.assert_array_equal(
        np.array(found.classes)[there], np.array(expected.classes)[there]
    )
    for name in ("boxes", "scores"):
        ours, theirs = (np.array(getattr(x, name))[there] for x in (found, expected))
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=1e-4)


def detected(probabilities, boxes, valid, config=DETECTOR):
    function = functools.partial(detect, config=config)
    return jax.vmap(function)(probabilities, boxes, valid)


@pytest.mark.parametrize("fields", [{}, {"context": True}, {"class_agnostic": True}])
def test_one_detector_at_one_scale(fields):
    model, variables = detector(**fields)
    scales = pictures(64)
    member, sizes = (model, variables), scales[0][1]
    maps = map_of(member, scales[0])
    proposals = call(member, proposals_of, maps, sizes)
    outputs = classified(member, maps, proposals.boxes, sizes)
    expected = detected(*outputs, proposals.valid)
    assert_same(run([member], scales), expected)
    # Scales that name only that of training are no others.
    again = model.clone(config=dataclasses.replace(model.config, test_scales=(64,)))
    assert_same(run([(again, variables)], scales), expected, atol=1e-4)


def refined_by_loops(first, second, valid, config):
    """One image: NMS of each class over both passes, then voting."""
    scores = np.concatenate([first[0], second[0]])[:, :-1].astype(np.float64)
    boxes = np.concatenate([first[1], second[1]]).astype(np.float64)
    usable = np.tile(valid, 2)[:, None] & (scores > config.score_threshold)
    rows = []
    for kind in range(K):
        kept = []
        for index in np.argsort(-scores[:, kind], kind="stable"):
            near = [overlap(boxes[index, kind], boxes[k, kind]) for k in kept]
            if usable[index, kind] and max(near, default=0) <= config.nms:
                kept.append(index)
        rows += [(scores[index, kind], kind, index) for index in kept]
    rows = sorted(rows, key=lambda row: -row[0])[: config.detections]
    classes = np.broadcast_to(np.arange(K), scores.shape)
    moved = vote_loop(
        [boxes[index, kind] for _, kind, index in rows],
        [kind for _, kind, _ in rows],
        boxes.reshape(-1, 4),
        scores.ravel(),
        classes.ravel(),
        usable.ravel(),
        config.test_vote,
    )
    return moved, [row[0] for row in rows], [row[1] for row in rows]


@pytest.mark.parametrize("vote", [0.5, 0.3, 1.0])
def test_box_refinement(vote):
    model, variables = detector(test_refine=True, test_vote=vote)
    scales = pictures(64)
    member, sizes = (model, variables), scales[0][1]
    maps = map_of(member, scales[0])
    proposals = call(member, proposals_of, maps, sizes)
    first = [np.array(x) for x in classified(member, maps, proposals.boxes, sizes)]
    best = first[0][..., :-1].argmax(-1)
    regressed = np.take_along_axis(first[1], best[..., None, None], 2)[:, :, 0]
    second = [np.array(x) for x in classified(member, maps, regressed, sizes)]
    found = run([member], scales)
    for image in range(2):
        boxes, scores, classes = refined_by_loops(
            [x[image] for x in first],
            [x[image] for x in second],
            np.array(proposals.valid[image]),
            model.config,
        )
        count = int(found.valid[image].sum())
        assert count == len(scores) > 1
        np.testing.assert_array_equal(found.classes[image][:count], classes)
        np.testing.assert_allclose(found.scores[image][:count], scores, atol=1e-4)
        np.testing.assert_allclose(found.boxes[image][:count], boxes, atol=0.05)


def features_at(member, maps, sizes):
    """A function of an image and a box to the tail's features, of one region alone."""
    model, variables = member

    @jax.jit
    def features(maps, box, sizes):
        net = model.bind(variables)
        return net.tail_features(net.pool(maps, box[None, None], sizes))[0, 0]

    def function(image, box):
        one = slice(image, image + 1)
        return features(maps[one], box, sizes[one])

    return function


@pytest.mark.parametrize("context", [False, True])
def test_regions_have_the_larger_features_of_two_scales(context):
    sides, base = (48, 64, 96), 1
    model, variables = detector(context=context, test_scales=sides, test_region_side=40)
    scales = pictures(*sides)
    member = model, variables
    maps = [map_of(member, scale) for scale in scales]
    proposals = call(member, proposals_of, maps[base], scales[base][1])
    everywhere = [features_at(member, maps[i], scales[i][1]) for i in range(3)]
    features, used = [], set()
    for image in range(2):
        size = scales[base][1][image]
        sizes = [scale[1][image] for scale in scales]
        boxes = np.array(proposals.boxes[image])
        if context:
            boxes = np.concatenate([boxes, [[0, 0, size[1], size[0]]]])
        chosen = scales_loop(boxes.astype(np.float64), size, sizes, 40**2)
        rows = []
        for box, pair in zip(boxes, chosen, strict=True):
            used.add(tuple(pair))
            factors = [np.tile((sizes[scale] / size)[::-1], 2) for scale in pair]
            at_scale = [
                everywhere[scale](image, (box * factor).astype(np.float32))
                for scale, factor in zip(pair, factors, strict=True)
            ]
            rows.append(np.maximum(*at_scale))
        features.append(rows)
    features = np.array(features)
    if context:
        beside = np.broadcast_to(features[:, -1:], features[:, :-1].shape)
        features = np.concatenate([features[:, :-1], beside], axis=-1)
    assert len(used) == 2
    logits, deltas = call(member, lambda net, x: net.head(x), features)
    boxes = decoded(deltas, proposals.boxes, scales[base][1])
    expected = detected(jax.nn.softmax(logits), boxes, proposals.valid)
    assert_same(run([(model, variables)], scales, base), expected, atol=0.05)


def test_an_ensemble_of_equals_finds_what_one_finds():
    one, scales = detector(), pictures(64)
    alone = run([one], scales)
    assert_same(run([one, one], scales), alone)
    assert_same(run([one, one, one], scales), alone)


def test_an_ensemble_shares_proposals_and_takes_the_mean():
    first, second = detector(0, detections=16), detector(1, context=True)
    scales = pictures(64)
    sizes, members = scales[0][1], []
    for member in (first, second):
        maps = map_of(member, scales[0])
        members.append((member, maps, call(member, proposals_of, maps, sizes)))
    found = run([first, second], scales)
    for image in range(2):
        rows = []
        for rank in range(DETECTOR.test_proposals):
            for _, _, proposals in members:
                box = np.array(proposals.boxes[image, rank])
                near = [overlap(box, other) for other in rows]
                if proposals.valid[image, rank] and max(near, default=0) <= 0.7:
                    rows.append(box)
        assert DETECTOR.test_proposals < len(rows)
        union = jnp.asarray(np.array(rows))[None]
        outputs = [
            classified(member, maps[image : image + 1], union, sizes[image : image + 1])
            for member, maps, _ in members
        ]
        probabilities, boxes = ((a + b) / 2 for a, b in zip(*outputs, strict=True))
        valid = jnp.ones(union.shape[:2], bool)
        expected = detected(probabilities, boxes, valid, first[0].config)
        ours = jax.tree.map(lambda x, image=image: x[image : image + 1], found)
        assert_same(ours, expected)
