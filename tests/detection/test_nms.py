"""Non-maximum suppression against the greedy loop."""

import functools

import jax
import numpy as np
import pytest

from resnet_jax.detection import nms as module
from resnet_jax.detection.nms import nms, nms_by_class


def overlap(a, b):
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = np.prod(np.maximum(sides, 0))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared
    return shared / union if union > 0 else 0


def greedy(boxes, scores, valid, threshold, size, classes=None):
    """The loop of py-faster-rcnn, which keeps one box after another."""
    classes = np.zeros(len(boxes)) if classes is None else classes
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if valid[i] and all(
            classes[i] != classes[j] or overlap(boxes[j], boxes[i]) <= threshold
            for j in kept
        ):
            kept.append(int(i))
    return kept[:size]


def kept(result):
    indices, valid = (np.asarray(part) for part in result)
    assert indices.dtype == np.int32
    count = valid.sum()
    assert valid[:count].all()
    assert (indices[count:] == 0).all()
    return indices[:count].tolist()


def scene(rng, n, kind):
    """Boxes on whole pixels, so that IoUs are exact and thresholds are met exactly."""
    corners = rng.integers(0, 60, (n, 2))
    sides = rng.integers(1, 40, (n, 2))
    scores = rng.uniform(size=n).astype(np.float32)
    if kind == "chain":  # each box suppresses the next alone
        corners = np.stack([np.arange(n) * 4, np.zeros(n)], -1)
        sides, scores = np.full((n, 2), 10), np.linspace(1, 0, n, dtype=np.float32)
    if kind == "duplicates":
        corners, sides = corners[rng.integers(0, 9, n)], sides[:1]
    if kind == "ties":
        scores = np.round(scores, 1)
    if kind == "empty":
        sides[::3] = 0
    boxes = np.concatenate([corners, corners + sides], -1).astype(np.float32)
    return boxes, scores, rng.uniform(size=n) < 0.9


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, the last one not full."""
    monkeypatch.setattr(module, "_BLOCK", 32)


@functools.partial(jax.jit, static_argnames="size")
def compiled(*args, size):
    return nms(*args, size)


@pytest.mark.parametrize("kind", ["random", "chain", "duplicates", "ties", "empty"])
def test_it_keeps_what_the_greedy_loop_keeps(kind):
    rng = np.random.default_rng(0)
    for threshold in np.arange(0.3, 0.95, 0.1).round(1).astype(np.float32):
        boxes, scores, valid = scene(rng, 150, kind)
        for size in (10, 200):
            expected = greedy(boxes, scores, valid, threshold, size)
            ours = compiled(boxes, scores, valid, threshold, size=size)
            assert kept(ours) == expected
    assert len(expected) > 8


def test_classes_do_not_suppress_each_other():
    rng = np.random.default_rng(1)
    boxes, scores, valid = scene(rng, 150, "ties")
    classes = rng.integers(0, 4, 150)
    for size in (20, 150):
        expected = greedy(boxes, scores, valid, 0.3, size, classes)
        assert kept(nms_by_class(boxes, scores, classes, valid, 0.3, size)) == expected


def test_few_boxes_none_valid_and_scores_of_minus_infinity():
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 8], [50, 0, 60, 9]], np.float32)
    scores = np.array([-np.inf, 0.5, -np.inf], np.float32)
    everything, nothing = np.ones(3, bool), np.zeros(3, bool)
    assert kept(nms(boxes, scores, everything, 0.5, 5)) == [1, 2]
    assert kept(nms(boxes, scores, ~nothing & (np.arange(3) > 1), 0.5, 5)) == [2]
    assert kept(nms(boxes, scores, nothing, 0.5, 5)) == []


def test_images_of_a_batch_are_separate():
    rng = np.random.default_rng(2)
    scenes = [scene(rng, 100, kind) for kind in ("random", "chain", "duplicates")]
    batch = jax.vmap(lambda *image: nms(*image, 0.5, 60))
    indices, valid = batch(*(np.stack(part) for part in zip(*scenes)))
    for place, image in enumerate(scenes):
        expected = greedy(*image, 0.5, 60)
        assert kept((indices[place], valid[place])) == expected


def test_memory_of_12000_proposals(monkeypatch):
    """Never all pairs: their IoUs alone would take 576 MB."""
    monkeypatch.undo()
    n = 12_000
    shapes = [((n, 4), np.float32), ((n,), np.float32), ((n,), bool)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    program = jax.jit(lambda *a: nms(*a, 0.7, 2000)).lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes < 20e6


def test_it_is_the_same_with_64_bits():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 60, (40, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + 20], axis=1)
    scores, valid = rng.uniform(size=40).astype(np.float32), np.ones(40, bool)
    narrow = nms(boxes, scores, valid, 0.5, 40)
    with jax.enable_x64(True):
        wide = nms(boxes, scores, valid, 0.5, 40)
    for one, other in zip(narrow, wide):
        np.testing.assert_array_equal(one, other)
