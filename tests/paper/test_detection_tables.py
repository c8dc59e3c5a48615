"""Tables 7 to 14: numbers as published, and detectors tested here beside them."""

import json
import statistics

import numpy as np
import pytest

from resnet_jax.cli import main
from resnet_jax.detection.annotations import Annotation
from resnet_jax.detection.detections import Detections
from resnet_jax.detection.result import evaluation_result
from resnet_jax.errors import UserError
from resnet_jax.paper.detection import DETECTION_TABLES, VOC_CLASSES
from resnet_jax.paper.experiments import DETECTION, find_experiment
from resnet_jax.paper.report import report
from tests.conftest import make_console


def rows(name):
    return {line[0]: list(line[1:]) for line in DETECTION[name].table.rows}


def test_tables_are_the_papers():
    assert rows("table7") == {
        "VGG-16": ["73.2", "70.4"],
        "ResNet-101": ["76.4", "73.8"],
    }
    assert rows("table8") == {
        "VGG-16": ["41.5", "21.2"],
        "ResNet-101": ["48.4", "27.2"],
    }
    # Section 4.3: 6.0 points and 28 % of the standard metric.
    vgg, resnet = (float(values[1]) for values in rows("table8").values())
    assert resnet - vgg == pytest.approx(6.0)
    assert resnet / vgg == pytest.approx(1.28, abs=0.005)
    nine = rows("table9")
    assert nine["baseline, ResNet-101"][:2] == rows("table8")["ResNet-101"]
    assert nine["+ multi-scale testing"] == ["53.8", "32.5", "55.7", "34.9"]
    assert nine["ensemble"] == ["", "", "59.0", "37.4"]
    assert rows("table12")["ensemble"] == ["63.6", "62.1"]
    errors = [line[-1] for line in DETECTION["table13"].table.rows]
    assert errors == ["33.1", "13.3", "11.7", "14.4", "10.6", "8.9"]
    # Appendix C: 64 % less error than the best of 2014.
    fourteen = rows("table14")
    before, after = (
        float(fourteen[f"{n}"][1]) for n in ("VGG (ILSVRC'14)", "ResNet (ILSVRC'15)")
    )
    assert 1 - after / before == pytest.approx(0.64, abs=0.005)
    for table in DETECTION_TABLES:
        assert {len(line) for line in table.table.rows} == {len(table.table.header)}


@pytest.mark.parametrize("name", ["table10", "table11"])
def test_the_classes_have_the_published_mean(name):
    table = rows(name)
    assert [*table] == ["mean", *VOC_CLASSES]
    for column in range(3):
        values = [float(table[c][column]) for c in VOC_CLASSES]
        mean = float(table["mean"][column])
        assert statistics.fmean(values) == pytest.approx(mean, abs=0.1)
    place = 0 if name == "table10" else 1
    assert table["mean"][:2] == [line[place] for line in rows("table7").values()]


def test_they_are_listed(capsys):
    main(["paper", "list"])
    text = capsys.readouterr().out
    for table in DETECTION_TABLES:
        assert f"{table.name}: {table.title}" in text
    assert "    ResNet-101                  76.4                   73.8" in text
    with pytest.raises(UserError, match="table7 is of detectors"):
        find_experiment("table7")


def result(names, images, shift, coco=False):
    """Of one object an image, of which the detector finds some well enough."""
    labels = np.arange(images) % len(names)
    box = np.array([[10, 10, 50, 50]], np.float32)
    marks = np.zeros(1, bool)
    annotations = [
        Annotation(
            (60, 60), box, np.array([k], np.int32), marks, marks, box[:, 0] * 160
        )
        for k in labels
    ]
    moved = [box + (shift if i % 10 == 0 else 0) for i in range(images)]
    found = [Detections(b, [0.5], [k]) for b, k in zip(moved, labels)]
    content, _ = evaluation_result(
        annotations,
        [str(i) for i in range(images)],
        names,
        None,
        found,
        coco=coco,
        protocol={"shorter_side": 600},
    )
    return content


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tested")
    contents = {
        "resnet-voc/seed-0": result(VOC_CLASSES, 4952, 30),
        "resnet-voc/seed-1": result(VOC_CLASSES, 4952, 0),
        "resnet-coco": result([f"c{i}" for i in range(80)], 5000, 30, coco=True),
        "cells": result(("red", "white"), 20, 30),
        "unfinished": None,
    }
    for name, content in contents.items():
        path = folder / "detection" / name
        path.mkdir(parents=True)
        if content is not None:
            (path / "result.json").write_text(json.dumps(content))
    return folder, contents


def cells(text, start):
    line = next(x for x in text.splitlines() if x.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_measured_numbers_have_tables_of_their_own(tested):
    folder, contents = tested
    report(folder, console=make_console())
    text = (folder / "report.md").read_text()
    page = (folder / "report.html").read_text()
    titles = [line[4:] for line in text.splitlines() if line.startswith("### ")]
    shown = [DETECTION[f"table{n}"].title for n in (7, 8, 9, 10)]
    assert titles == [*shown, "Detectors on other data"]
    assert all(title.split(":")[0] in page for title in titles)
    assert cells(text, "ResNet-101") == ["ResNet-101", "76.4", "73.8"]
    first, second = (
        100 * contents[f"resnet-voc/seed-{n}"]["voc"]["map_area"] for n in (0, 1)
    )
    assert first < 95 < second == 100
    mean, deviation = (first + second) / 2, abs(first - second) / 2**0.5
    measured = cells(text, "resnet-voc")
    assert measured[2:] == [
        f"{mean:.2f} \u00b1 {deviation:.2f}",
        "2",
        "20 classes, 4,952 images",
        "shorter side 600",
    ]
    assert len(cells(text, "resnet-coco")) == len(measured) + 3
    assert cells(text, "cells")[3:5] == ["1", "2 classes, 20 images"]
    ten = text[text.index("### Table 10") :]
    header = "| class | resnet-voc, 11 points | resnet-voc, area |"
    assert header in ten[ten.index("#### Measured here, AP of each class") :]
    assert "unfinished" not in text


def test_a_table_alone(tested, tmp_path):
    folder, _ = tested
    report(folder, only=["table13"], console=make_console())
    text = (folder / "report.md").read_text()
    assert [x for x in text.splitlines() if x.startswith("### ")] == [
        f"### {DETECTION['table13'].title}"
    ]
    assert "- not measured: no run in the folder detection was tested" in text
    (tmp_path / "detection" / "bad").mkdir(parents=True)
    (tmp_path / "detection" / "bad" / "result.json").write_text('{"voc": 3}')
    with pytest.raises(UserError, match=r"result.json is damaged: voc is 3"):
        report(tmp_path, console=make_console())
