"""COCO's figures against pycocotools, which gets the objects in COCO's own format."""

import contextlib
import copy
import io
import sys

import numpy as np
import pytest

from resnet_jax.detection.coco_figures import FIGURES, coco_figures
from resnet_jax.detection.detections import Detections
from resnet_jax.errors import UserError
from tests.detection.cases import (
    annotation,
    coco_content,
    coco_objects,
    detected,
    made_up,
)

NAMES = ("a", "b", "c", "d", "never there")
GAPS = [90, 3, 1, 44, 13]


def reference(content, results):
    """The twelve figures by pycocotools; -1 where there is no object."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = copy.deepcopy({"info": {}, **content})
        truth.createIndex()
        evaluation = cocoeval.COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    means = [p[p > -1].mean() if (p > -1).any() else -1 for p in precision.T]
    return evaluation.stats, dict(zip(evaluation.params.catIds, means))


def content_of(annotations, ids):
    items = [
        {
            "image_id": image + 1,
            "category_id": ids[label],
            "bbox": [*map(float, [box[0], box[1], *(box[2:] - box[:2])])],
            "area": float(area),
            "iscrowd": int(crowd),
        }
        for image, each in enumerate(annotations)
        for box, label, area, crowd in zip(
            each.boxes.astype(float), each.classes, each.areas, each.crowd
        )
    ]
    return {
        "images": [
            {"id": i + 1, "height": each.size[0], "width": each.size[1]}
            for i, each in enumerate(annotations)
        ],
        "categories": [{"id": i, "name": str(i)} for i in ids],
        "annotations": [{"id": i, **item} for i, item in enumerate(items, 1)],
    }


def results_of(detections, ids, images=None):
    return [
        {
            "image_id": images[image] if images else image + 1,
            "category_id": ids[label],
            "bbox": [*map(float, [box[0], box[1], *(box[2:] - box[:2])])],
            "score": float(score),
        }
        for image, found in enumerate(detections)
        for box, label, score in zip(
            found.boxes.astype(float), found.classes, found.scores
        )
    ]


def compare(figures, expected, tolerance=1e-9):
    stats, by_class = expected
    ours = [-1 if value is None else value for value in figures.figures.values()]
    np.testing.assert_allclose(ours, stats, atol=tolerance)
    ours = [-1 if v["AP"] is None else v["AP"] for v in figures.by_class.values()]
    np.testing.assert_allclose(ours, by_class, atol=tolerance)


@pytest.mark.parametrize("digits", [None, 1])  # many equal scores with one digit
@pytest.mark.parametrize("seed", range(4))
def test_made_up_detections(seed, digits):
    annotations = made_up(seed, images=5 * 3**seed, crowds=True)
    # More than a hundred detections of a class: the rest must not count.
    others = (3, 3, 600, 3)[seed]
    detections = detected(annotations, 4, seed, digits, others)
    figures = coco_figures(annotations, detections, NAMES, GAPS)
    stats, means = reference(
        content_of(annotations, GAPS), results_of(detections, GAPS)
    )
    compare(figures, (stats, [means[i] for i in GAPS]))
    assert figures.by_class["never there"] == {"AP": None, "AP50": None}
    assert 0.001 < figures.figures["AP"] < 0.9
    ap50 = [v["AP50"] for v in figures.by_class.values() if v["AP50"] is not None]
    assert np.mean(ap50) == pytest.approx(figures.figures["AP50"])


def test_coco_in_small():
    """The real objects, in COCO's own numbers and not through our float32."""
    content = coco_content()
    annotations, ids = coco_objects(content)
    assert any(each.crowd.any() for each in annotations)
    assert ids != list(range(1, len(ids) + 1))
    detections = detected(annotations, len(ids), 0, digits=3)
    images = sorted(image["id"] for image in content["images"])
    names = [str(i) for i in ids]
    stats, means = reference(content, results_of(detections, ids, images))
    figures = coco_figures(annotations, detections, names, ids)
    compare(figures, (stats, [means[i] for i in ids]), 1e-6)


def test_perfect_detections():
    annotations = made_up(5, images=30, crowds=True)
    perfect = [
        Detections(each.boxes, np.linspace(1, 0.5, len(each.boxes)), each.classes)
        for each in annotations
    ]
    figures = coco_figures(annotations, perfect, NAMES).figures
    assert [*figures] == [*FIGURES]
    assert figures["AP"] == figures["AP50"] == figures["AP75"] == pytest.approx(1)
    assert figures["AR100"] == pytest.approx(1)
    assert figures["AR1"] < 1  # some images have two objects of a class


def test_half_the_overlaps_are_enough():
    """Overlap 0.72: right at 0.50, 0.55, 0.60, 0.65 and 0.70, five of ten."""
    image = annotation((200, 200), [[0, 0, 100, 100]], [0])
    found = Detections([[0, 0, 100, 72]], [0.5], [0])
    figures = coco_figures([image], [found], ("a",)).figures
    assert figures["AP"] == figures["APl"] == figures["AR1"] == pytest.approx(0.5)
    assert (figures["AP50"], figures["AP75"]) == (pytest.approx(1), 0)
    assert figures["APs"] is None


def test_crowds_and_nothing():
    nothing = Detections(np.zeros((0, 4)), [], [])
    one = annotation((99, 99), [[0, 0, 50, 50]], [0])
    assert coco_figures([one], [nothing], ("a",)).figures["AP"] == 0
    empty = annotation((99, 99), [], [])
    assert set(coco_figures([empty], [nothing], ("a",)).figures.values()) == {None}
    # Inside a crowd, any number of detections is ignored.
    crowd = annotation(
        (99, 99), [[0, 0, 90, 90], [91, 91, 99, 99]], [0, 0], crowd=[True, False]
    )
    found = Detections(
        [[1, 1, 9, 9], [2, 2, 9, 9], [91, 91, 99, 99]], [0.9, 0.8, 0.7], [0, 0, 0]
    )
    assert coco_figures([crowd], [found], ("a",)).figures["AP"] == pytest.approx(1)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(
        UserError, match=r"not installed; install it with: pip.*\[detec"
    ):
        coco_figures([annotation((9, 9), [], [])], [Detections([], [], [])], ("a",))
