"""Detections with the improvements of appendix B, against the same steps by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_jax import parallel
from resnet_jax.config import DetectionConfig
from resnet_jax.config.detection import (
    BackboneConfig,
    DetectorConfig,
)
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.detection.annotations import decode
from resnet_jax.detection.detector import Detector, finder, open_members, protocol_of
from resnet_jax.detection.evaluate import evaluate_detector
from resnet_jax.detection.faster_rcnn import make_detector, prepared, proposals_of
from resnet_jax.detection.head import decode_regions, detect
from resnet_jax.detection.inference import detections_of
from resnet_jax.detection.sources.voc import open_voc
from resnet_jax.detection.train import train_detector
from resnet_jax.errors import UserError
from tests.detection.layouts import write_voc
from tests.detection.test_improvements import overlap, scales_loop, vote_loop
from tests.detection.tiny import tiny_config, write_four_images

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


def detector(seed=0, num_classes=K, **fields):
    """A small net with random weights and statistics, its variables, and a config."""
    config = dataclasses.replace(DETECTOR, **fields)
    whole = DetectionConfig(
        model=BackboneConfig(name="resnet10t", width=4), detector=config
    )
    model = make_detector(whole, num_classes)
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


@pytest.mark.parametrize("vote", [0.4, 1.0])
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


def test_regions_have_the_larger_features_of_two_scales():
    sides, base = (48, 64, 96), 1
    model, variables = detector(context=True, test_scales=sides, test_region_side=40)
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
        # The context is one more region, with two scales of its own.
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


def opened(root, seeds, **overrides):
    """Detectors of a data set's folder, with random weights."""
    members = []
    for seed in seeds:
        config = tiny_config(root, **overrides)
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, name="resnet10t", width=4),
            detector=dataclasses.replace(DETECTOR, context=seed == 1),
        )
        _, variables = detector(seed, num_classes=2, context=seed == 1)
        members.append(
            Detector(
                config=config,
                model=make_detector(config, 2),
                variables=variables,
                statistics=STATISTICS,
                class_names=("tall", "wide"),
                mesh=parallel.data_mesh(),
            )
        )
    return members


def write_images(root):
    """A landscape and a portrait with two rectangles each."""
    images = {
        f"image{number}": (
            *size,
            [("wide", (4, 8, 44, 28)), ("tall", (20, 10, 35, 40))],
        )
        for number, size in enumerate([(90, 60), (48, 90)])
    }
    for split in ("train", "test"):
        write_voc(root, split, images)
    return root


IMPROVED = {
    "detector.test_refine": "true",
    "detector.test_scales": "48,64",
    "detector.test_region_side": "30",
}


@pytest.mark.slow
def test_files_go_through_all_improvements(tmp_path):
    """The scales of each image meet, and boxes come back to its own pixels."""
    detectors = opened(write_images(tmp_path), seeds=(0, 1))
    members = open_members(detectors, overrides=IMPROVED)
    source = open_voc(tmp_path, "test")
    found = finder(members)(source=source, batch_size=2)
    limits = {48: 72, 64: 96}
    assert len(found) == len(source) == 2
    for index, ours in enumerate(found):
        pixels = decode(source, index)
        original = np.array(pixels.shape[:2])
        scales = []
        for side, longest in limits.items():
            factor = min(side / original.min(), longest / original.max())
            size = np.round(original * factor).astype(np.int32)
            image = Image.fromarray(pixels).resize(
                size[::-1], Image.Resampling.BILINEAR
            )
            padded = np.zeros((1, *-(-size // 16) * 16, 3), np.uint8)
            padded[0, : size[0], : size[1]] = image
            scales.append((padded, size[None]))
        models = [(member.model, member.variables) for member in members]
        expected = jax.tree.map(lambda x: np.array(x[0]), run(models, scales, base=1))
        there = expected.valid
        assert 0 < there.sum() == len(ours)
        np.testing.assert_array_equal(ours.classes, expected.classes[there])
        np.testing.assert_allclose(ours.scores, expected.scores[there], rtol=1e-3)
        scale = np.tile((scales[1][1][0] / original)[::-1], 2)
        np.testing.assert_allclose(ours.boxes * scale, expected.boxes[there], atol=0.1)


def test_an_evaluation_says_how_it_tested(tmp_path, console):
    root = write_images(tmp_path)
    detectors = opened(root, seeds=(0, 1))
    refined = {"detector.test_refine": "true"}
    result = evaluate_detector(detectors, overrides=refined, console=console)
    assert result["model"] == "resnet10t + resnet10t"
    assert result["members"] == [{"model": "resnet10t", "step": 0}] * 2
    protocol = result["protocol"]
    assert (protocol["refine"], protocol["vote"]) == (True, 0.5)
    assert protocol["scales"] is protocol["region_side"] is None
    config = open_members(detectors, overrides=IMPROVED)[1].config
    protocol = protocol_of(config)
    assert (protocol["scales"], protocol["region_side"]) == ((48, 64), 30)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"detector.roi_size": "7"}, "detector.roi_size cannot be changed for a"),
        ({"detector.test_scales": "48,80"}, "48,80 must rise and contain data.sh"),
        ({"detector.test_scales": "80,64"}, "80,64 must rise and contain data.sh"),
        ({"detector.test_vote": "2"}, "detector.test_vote"),
    ],
)
def test_what_cannot_be_tested_is_refused(tmp_path, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        open_members(opened(tmp_path, seeds=(0,)), overrides=overrides)


def test_an_ensemble_has_the_same_classes(tmp_path):
    first, second = opened(tmp_path, seeds=(0, 1))
    other = dataclasses.replace(second, class_names=("wide", "tall"))
    with pytest.raises(UserError, match="detector 2 finds wide, tall, but the first"):
        open_members([first, other])
    with pytest.raises(UserError, match="give at least one detector"):
        open_members([])


@pytest.mark.slow
def test_improvements_keep_what_a_trained_detector_finds(tmp_path, console):
    root = write_four_images(tmp_path / "data")
    workdirs = []
    for seed in (0, 1):
        config = tiny_config(
            root,
            **{
                "seed": seed,
                "training.steps": 250,
                "training.global_batch_size": 8,
                "checkpoint.every_steps": 250,
                "data.shorter_side": 64,
            },
        )
        workdirs.append(tmp_path / f"run{seed}")
        train_detector(config, workdirs[-1], console)
    for overrides in ({}, IMPROVED):
        result = evaluate_detector(workdirs, overrides=overrides, console=console)
        assert result["voc"]["map_area"] > 0.99
