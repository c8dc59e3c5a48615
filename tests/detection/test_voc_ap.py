"""AP against the official arithmetic in VOC's own coordinates, written anew."""

import time

import numpy as np
import pytest

from resnet_jax.detection.detections import (
    Detections,
    load_detections,
    save_detections,
)
from resnet_jax.detection.voc_ap import voc_average_precision
from resnet_jax.errors import UserError
from tests.detection.cases import (
    FROM_ONE,
    VOC,
    annotation,
    detected,
    made_up,
    voc_objects,
)


def official(annotations, detections, label, limit=0.5):
    """voc_eval of py-faster-rcnn, one detection at a time, from 1 and inclusive."""
    objects, total = [], 0
    for each in annotations:
        mine = each.classes == label
        objects.append(
            {
                "boxes": each.boxes[mine].astype(float) + FROM_ONE,
                "difficult": each.difficult[mine],
                "seen": [False] * mine.sum(),
            }
        )
        total += np.sum(~each.difficult[mine])
    lines = [
        (float(score), image, box.astype(float) + FROM_ONE)
        for image, found in enumerate(detections)
        for box, score, c in zip(found.boxes, found.scores, found.classes)
        if c == label
    ]
    lines.sort(key=lambda line: -line[0])  # stable
    true, false = np.zeros(len(lines)), np.zeros(len(lines))
    for i, (_, image, box) in enumerate(lines):
        best, which = -np.inf, None
        for j, other in enumerate(objects[image]["boxes"]):
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            inter = max(width, 0) * max(height, 0)
            union = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
            union += (other[2] - other[0] + 1) * (other[3] - other[1] + 1) - inter
            if inter / union > best:
                best, which = inter / union, j
        if best > limit:
            if objects[image]["difficult"][which]:
                continue
            if objects[image]["seen"][which]:
                false[i] = 1
            else:
                true[i] = objects[image]["seen"][which] = 1
        else:
            false[i] = 1
    if total == 0:
        return None, None
    true, false = np.cumsum(true), np.cumsum(false)
    recall = true / total
    precision = true / np.maximum(true + false, np.finfo(np.float64).eps)
    eleven = 0.0
    for threshold in np.arange(0.0, 1.1, 0.1):
        if np.any(recall >= threshold):
            eleven += precision[recall >= threshold].max() / 11
    r = np.concatenate([[0], recall, [1]])
    p = np.concatenate([[0], precision, [0]])
    for i in range(len(p) - 1, 0, -1):
        p[i - 1] = max(p[i - 1], p[i])
    area = sum((r[i + 1] - r[i]) * p[i + 1] for i in range(len(r) - 1))
    return eleven, area


def check(annotations, detections, names, limit=0.5):
    found = voc_average_precision(annotations, detections, names, limit)
    pairs = [official(annotations, detections, k, limit) for k in range(len(names))]
    for each, (eleven, area) in zip(found.classes, pairs):
        assert each.ap_11 == pytest.approx(eleven, abs=1e-12)
        assert each.ap_area == pytest.approx(area, abs=1e-12)
    known = [pair for pair in pairs if pair[0] is not None]
    if known:
        assert found.map_11 == pytest.approx(np.mean(known, 0)[0], abs=1e-12)
        assert found.map_area == pytest.approx(np.mean(known, 0)[1], abs=1e-12)
    return found


@pytest.mark.parametrize("digits", [None, 1])  # many equal scores with one digit
@pytest.mark.parametrize("limit", [0.3, 0.5, 0.75])
def test_made_up_detections(digits, limit):
    values = []
    for seed in range(12):
        annotations = made_up(seed, images=int(3 * 1.3**seed))
        detections = detected(annotations, 4, seed, digits)
        names = ("a", "b", "c", "d", "never there")
        values.append(check(annotations, detections, names, limit).map_area)
    assert 0.05 < min(values) < max(values) < 0.99


def found(boxes, scores, classes=None):
    return Detections(boxes, scores, [0] * len(scores) if classes is None else classes)


def test_a_class_by_hand():
    """Two objects that count: right, ignored, duplicate, wrong, right."""
    image = annotation(
        (99, 99),
        [[0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 80, 80]],
        [0, 0, 0],
        difficult=[False, True, False],
    )
    boxes = [
        [0, 0, 10, 9],
        [20, 20, 40, 39],
        [0, 0, 10, 10],
        [1, 60, 9, 70],
        [50, 50, 80, 79],
    ]
    result = voc_average_precision(
        [image], [found(boxes, [0.9, 0.8, 0.7, 0.6, 0.5])], ("thing", "none")
    )
    thing, none = result.classes
    assert (thing.objects, thing.ignored, thing.detections) == (2, 1, 5)
    np.testing.assert_allclose(thing.recalls, [0.5, 0.5, 0.5, 0.5, 1])
    np.testing.assert_allclose(thing.precisions, [1, 1, 1 / 2, 1 / 3, 1 / 2])
    assert thing.ap_area == pytest.approx(0.5 * 1 + 0.5 * 0.5)
    assert thing.ap_11 == pytest.approx((6 * 1 + 5 * 0.5) / 11)
    assert (none.ap_11, none.ap_area, none.objects) == (None, None, 0)
    assert result.map_area == thing.ap_area


def test_the_overlap_must_exceed_the_limit():
    image = annotation((20, 20), [[0, 0, 10, 10]], [0])
    half = [found([[0, 0, 10, 5]], [1.0])]  # exactly 0.5
    assert voc_average_precision([image], half, ("a",)).map_area == 0
    assert voc_average_precision([image], half, ("a",), 0.49).map_area == 1


def test_edges():
    empty, one = annotation((9, 9), [], []), annotation((9, 9), [[8, 8, 9, 9]], [0])
    nothing = found([], [])
    exact = found([[8, 8, 9, 9]], [0.1])
    assert voc_average_precision([one, empty], [exact, nothing], ("a",)).map_11 == 1
    assert voc_average_precision([one, empty], [nothing, exact], ("a",)).map_11 == 0
    assert voc_average_precision([one], [nothing], ("a",)).map_area == 0
    assert voc_average_precision([empty], [exact], ("a",)).map_area is None
    with pytest.raises(UserError, match="detections of 1 images and annotations of 2"):
        voc_average_precision([one, empty], [exact], ("a",))
    with pytest.raises(UserError, match="a detection of image 0 has class 3; there"):
        voc_average_precision([one], [found([[0, 0, 1, 1]], [1.0], [3])], ("a",))
    with pytest.raises(UserError, match="not finite"):
        found([[0, 0, 1, 1]], [np.nan])
    with pytest.raises(UserError, match=r"scores \(2,\)"):
        Detections(np.zeros((1, 4)), np.zeros(2), np.zeros(1))


def test_files_of_detections(tmp_path):
    detections = detected(made_up(1), 4, 1)
    names = [f"{i:06}" for i in range(len(detections))]
    save_detections(tmp_path / "d.npz", names, "abcd", detections)
    read_names, classes, read = load_detections(tmp_path / "d.npz")
    assert (read_names, classes) == (tuple(names), tuple("abcd"))
    for before, after in zip(detections, read):
        for field in ("boxes", "scores", "classes"):
            np.testing.assert_array_equal(getattr(before, field), getattr(after, field))
    first = read[0].to_json("abcd")[0]
    assert first["class"] in "abcd"
    assert np.float32(first["score"]) == read[0].scores[0] == read[0].scores.max()
    save_detections(tmp_path / "none.npz", [], "ab", [])
    assert load_detections(tmp_path / "none.npz") == ((), ("a", "b"), [])
    for damage in (b"", b"PK\x03\x04", (tmp_path / "d.npz").read_bytes()[:500]):
        (tmp_path / "bad.npz").write_bytes(damage)
        with pytest.raises(UserError, match=r"bad.npz is missing, damaged"):
            load_detections(tmp_path / "bad.npz")


@pytest.mark.parametrize("digits", [None, 2])
def test_voc_2007(digits):
    """All 4,952 images of the real test set."""
    annotations = list(voc_objects().values())
    detections = detected(annotations, 20, 0, digits)
    result = check(annotations, detections, VOC)
    person = result.classes[VOC.index("person")]
    assert (person.objects, person.ignored) == (4528, 699)
    assert 0.2 < result.map_11 < 0.95


def test_a_hundred_detections_an_image_take_seconds():
    annotations = made_up(0, images=4952, num_classes=20)
    detections = detected(annotations, 20, 0, false_ones=96)
    start = time.perf_counter()
    voc_average_precision(annotations, detections, VOC)
    assert time.perf_counter() - start < 15
