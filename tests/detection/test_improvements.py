"""The test-time improvements of appendix B against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection import improvements
from resnet_jax.detection.nms import nms_by_class


def random_boxes(rng, count, extent=100.0, least=5.0):
    corners = rng.uniform(0, extent, (count, 2))
    sides = rng.uniform(least, extent / 2, (count, 2))
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)


def overlap(a, b):
    """The IoU of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both) if both else 0.0


def vote_loop(kept, kept_classes, boxes, scores, classes, valid, threshold):
    moved = []
    for box, own in zip(kept, kept_classes, strict=True):
        total, mean = 0.0, np.zeros(4)
        for other, score, kind, exists in zip(
            boxes, scores, classes, valid, strict=True
        ):
            if exists and kind == own and overlap(box, other) >= threshold:
                total, mean = total + score, mean + score * other
        moved.append(mean / total if total else box)
    return np.array(moved)


def crowd(rng, count=60):
    """Boxes in heaps of two classes, some of them invalid."""
    centres = random_boxes(rng, 6)
    boxes = centres[rng.integers(6, size=count)] + rng.normal(0, 3, (count, 4))
    scores = rng.uniform(0.05, 1, count).astype(np.float32)
    classes = rng.integers(2, size=count).astype(np.int32)
    return boxes.astype(np.float32), scores, classes, rng.random(count) < 0.8


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_voting_is_the_weighted_mean_of_close_boxes_of_the_class(threshold):
    rng = np.random.default_rng(0)
    boxes, scores, classes, valid = crowd(rng)
    indices, kept = nms_by_class(boxes, scores, classes, valid, 0.3, 20)
    indices = np.array(indices)[np.array(kept)]
    given = boxes[indices], classes[indices], boxes, scores, classes, valid, threshold
    moved = improvements.vote(*given)
    np.testing.assert_allclose(moved, vote_loop(*given), rtol=1e-5)
    assert np.abs(moved - boxes[indices]).max() > 0.5


def test_a_vote_by_hand():
    kept = np.array([[0, 0, 10, 10], [50, 50, 50, 60]], np.float32)
    # IoU with the first: 1, 0.8, exactly 0.5, below 0.5, and 1 of another class.
    boxes = [[0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 5, 10], [0, 0, 4.9, 10]]
    boxes = np.array([*boxes, [0, 0, 10, 10]], np.float32)
    scores = np.array([0.9, 0.6, 0.5, 1, 1], np.float32)
    classes, valid = np.array([0, 0, 0, 0, 1]), np.ones(5, bool)
    moved = improvements.vote(kept, np.zeros(2, int), boxes, scores, classes, valid)
    right = (9 + 6 + 0.5 * 5) / 2
    bottom = (9 + 0.6 * 8 + 5) / 2
    # The second box has no area, so nothing overlaps it, and it stays.
    np.testing.assert_allclose(moved, [[0, 0, right, bottom], kept[1]], rtol=1e-6)


def classifier(rng, classes=3):
    """Probabilities and boxes that depend on the box alone; classes move it apart."""
    mix = rng.normal(size=(4, classes + 1)) / 10
    shifts = rng.normal(0, 5, (classes, 4)).astype(np.float32)

    def classify(boxes):
        probabilities = jax.nn.softmax((jnp.asarray(boxes) - 60) @ mix)
        return probabilities, jnp.asarray(boxes)[:, None] + shifts

    return classify


def test_refinement_classifies_the_box_of_the_most_probable_class_again():
    rng = np.random.default_rng(1)
    classify, proposals = classifier(rng), random_boxes(rng, 12)
    valid = np.arange(12) < 9
    probabilities, boxes, exist = improvements.refine(classify, proposals, valid)
    first, regressed = (np.array(each) for each in classify(proposals))
    best = [regressed[row, first[row, :3].argmax()] for row in range(12)]
    again = classify(np.array(best))
    assert len({int(row.argmax()) for row in first[:, :3]}) > 1
    np.testing.assert_array_equal(probabilities, np.concatenate([first, again[0]]))
    np.testing.assert_array_equal(boxes, np.concatenate([regressed, again[1]]))
    np.testing.assert_array_equal(exist, np.tile(valid, 2))


def scales_loop(boxes, size, sizes, pixels):
    chosen = []
    for x1, y1, x2, y2 in boxes:
        factors = [h * w / (size[0] * size[1]) for h, w in sizes]
        gaps = [abs((x2 - x1) * (y2 - y1) * factor - pixels) for factor in factors]
        nearest = gaps.index(min(gaps))
        beside = [i for i in (nearest - 1, nearest + 1) if 0 <= i < len(sizes)]
        other = min(beside, key=lambda i: (gaps[i], i), default=nearest)
        chosen.append(sorted([nearest, other]))
    return np.array(chosen)


@pytest.mark.parametrize("sides", [(200, 400, 600, 800, 1000), (300, 600), (600,)])
@pytest.mark.parametrize("pixels", [224**2, 100**2])
def test_the_scales_are_adjacent_and_nearest_in_area(sides, pixels):
    boxes = random_boxes(np.random.default_rng(2), 200, extent=1600, least=1)
    sizes = np.array([(side, round(side * 4 / 3)) for side in sides])
    size = np.array([600, 800])
    chosen = improvements.choose_scales(boxes, size, sizes, pixels)
    np.testing.assert_array_equal(chosen, scales_loop(boxes, size, sizes, pixels))
    assert len(np.unique(np.array(chosen), axis=0)) == max(len(sides) - 1, 1)


def test_regions_come_from_their_scales_and_boxes_follow_the_image():
    regions = [np.full((3, 2, 2, 1), 10 * scale) for scale in range(4)]
    chosen = np.array([[0, 1], [2, 3], [1, 2]])
    low, high = improvements.take_scales(regions, chosen)
    assert np.array(low)[:, 0, 0, 0].tolist() == [0, 20, 10]
    assert np.array(high)[:, 1, 1, 0].tolist() == [10, 30, 20]
    box = improvements.rescale(
        np.array([2, 3, 4, 5], np.float32), np.array([10, 20]), np.array([30, 20])
    )
    assert box.tolist() == [2, 9, 4, 15]


def union_loop(proposals, valid, threshold):
    ranked = [
        (rank, number, box)
        for number, (boxes, exist) in enumerate(zip(proposals, valid, strict=True))
        for rank, box in enumerate(boxes)
        if exist[rank]
    ]
    kept = []
    for _, _, box in sorted(ranked, key=lambda entry: entry[:2]):
        if all(overlap(box, other) <= threshold for other in kept):
            kept.append(box)
    return np.array(kept)


@pytest.mark.parametrize("detectors", [1, 2, 3])
def test_the_union_of_proposals_drops_repeated_ones_by_rank(detectors):
    rng = np.random.default_rng(3)
    first = random_boxes(rng, 30)
    proposals = [
        (first + rng.normal(0, 2, first.shape)).astype(np.float32)[rng.permutation(30)]
        for _ in range(detectors)
    ]
    valid = [np.arange(30) < 28 for _ in proposals]
    boxes, kept = (np.array(each) for each in improvements.union(proposals, valid, 0.7))
    assert boxes.shape == (30 * detectors, 4)
    expected = union_loop(proposals, valid, 0.7)
    assert detectors == 1 or 28 < len(expected) < 28 * detectors
    np.testing.assert_array_equal(boxes[kept], expected)
    assert kept[: len(expected)].all()


def test_an_ensemble_classifies_by_the_mean_of_its_members():
    rng = np.random.default_rng(4)
    members, boxes = [classifier(rng) for _ in range(3)], random_boxes(rng, 5)
    probabilities, regressed = improvements.average(members)(boxes)
    outputs = [member(boxes) for member in members]
    expected = sum(np.array(each[0]) for each in outputs) / 3
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    expected = sum(np.array(each[1]) for each in outputs) / 3
    np.testing.assert_allclose(regressed, expected, rtol=1e-5)
