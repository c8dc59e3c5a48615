"""The result file: figures of both kinds, and what they were measured on."""

import dataclasses
import json

import pytest

from resnet_jax.detection.coco_figures import FIGURES, coco_figures
from resnet_jax.detection.detections import Detections
from resnet_jax.detection.result import evaluation_result, headline, row_of
from resnet_jax.identity import Identity
from tests.detection.cases import annotation, detected, made_up

NAMES = ("a", "b", "c", "d", "never there")
ANNOTATIONS = made_up(3, images=30)
IMAGES = [f"{i:06}" for i in range(30)]
FOUND = detected(ANNOTATIONS, 4, 3)


def evaluate(annotations=ANNOTATIONS, names=IMAGES, **options):
    return evaluation_result(annotations, names, NAMES, None, FOUND, **options)


def test_what_the_file_says():
    identity = Identity("voc", None, NAMES, {"train": 5, "test": 30})
    result, precision = evaluate(
        coco=True, protocol={"shorter_side": 600}, identity=identity
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == {
        **result,
        "data": {**result["data"], "class_names": list(NAMES)},
    }
    assert result["protocol"] == {"shorter_side": 600}
    assert (result["images"], result["crowds"]) == (30, 0)
    ignored = sum(each.difficult.sum() for each in ANNOTATIONS)
    total = sum(len(each.boxes) for each in ANNOTATIONS)
    assert 0 < ignored == result["difficult"] == total - result["objects"]
    assert result["detections"] == sum(map(len, FOUND))
    assert result["voc"]["map_11"] == precision.map_11 != precision.map_area
    assert result["voc"]["map_area"] == precision.map_area
    coco = coco_figures(ANNOTATIONS, FOUND, NAMES)
    assert {name: result["coco"][name] for name in FIGURES} == coco.figures
    row = row_of(result)
    assert (row["test_map_area"], row["test_map_11"]) == (
        precision.map_area,
        precision.map_11,
    )
    assert row["test_ap75"] == coco.figures["AP75"]
    first = result["classes"]["a"]
    assert first["ap_area"] == precision.classes[0].ap_area
    assert first["AP"] == coco.by_class["a"]["AP"]
    assert result["classes"]["never there"]["ap_11"] is None
    area, points = 100 * precision.map_area, 100 * precision.map_11
    line = f"mAP {area:.2f} % by area, {points:.2f} % by 11 points at IoU 0.5; COCO AP "
    assert headline(result).startswith(line)
    assert headline(result).endswith(f"({result['objects']} objects on 30 images)")


def test_without_coco_or_objects():
    result, _ = evaluate()
    assert "coco" not in result
    assert [*row_of(result)] == ["test_map_area", "test_map_11"]
    assert "AP" not in result["classes"]["a"]
    empty, nothing = annotation((9, 9), [], []), Detections([], [], [])
    result, _ = evaluation_result([empty], ["x"], ("a",), None, [nothing], coco=True)
    assert headline(result).startswith("mAP none by area, none by 11 points")
    assert row_of(result) == {}
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("field", ["boxes", "classes", "difficult", "crowd", "areas"])
def test_the_checksum_notices_other_objects(field):
    before = evaluate()[0]["ground_truth"]
    assert evaluate()[0]["ground_truth"] == before
    place = next(i for i, each in enumerate(ANNOTATIONS) if len(each.boxes))
    values = getattr(ANNOTATIONS[place], field).copy()
    values[0] = ~values[0] if values.dtype == bool else 3 - values[0]
    other = list(ANNOTATIONS)
    other[place] = dataclasses.replace(other[place], **{field: values})
    assert evaluate(other)[0]["ground_truth"] != before
    assert evaluate(names=IMAGES[::-1])[0]["ground_truth"] != before
