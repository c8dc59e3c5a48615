"""Boxes on pictures, curves, and the page that shows both."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from resnet_jax.config.detection import DetectionConfig
from resnet_jax.detection.curves import detector_curves, precision_recall_figure
from resnet_jax.detection.detections import Detections, save_detections
from resnet_jax.detection.drawing import class_color, draw_boxes
from resnet_jax.detection.report import DETECTIONS, write_detection_report
from resnet_jax.detection.result import evaluation_result, headline
from resnet_jax.detection.voc_ap import voc_average_precision
from resnet_jax.errors import UserError
from resnet_jax.workdir import Workdir
from tests.detection.cases import annotation, detected, made_up

GREY = np.full((480, 640, 3), 128, np.uint8)
NAMES = ("cell", "a <b>$name$ that is\nmuch too long to stand beside its box")


def found(boxes, score=0.9, label=0):
    n = len(boxes)
    return Detections(boxes, np.full(n, score), np.full(n, label))


def close(pixel, color):
    return np.abs(pixel.astype(int) - color).max() <= 2


def test_a_box_is_where_it_was_found():
    drawn = draw_boxes(GREY, NAMES, found([[100, 200, 300, 400]]))
    assert drawn.shape == GREY.shape
    color = class_color(0)
    # Its outermost pixels are the box's; a dark line surrounds it.
    for row, column in ((300, 100), (300, 299), (399, 200), (200, 280)):
        assert close(drawn[row, column], color)
    for row, column in ((300, 99), (300, 300), (400, 200), (199, 280)):
        assert close(drawn[row, column], 0)
    inside = drawn[210:390, 110:290]
    assert (inside == 128).all()
    assert (drawn[:150] == 128).all()
    assert (drawn[150:199, 100:200] != 128).any()  # the label, above


def test_scores_below_the_least_are_left_out():
    low = found([[100, 200, 300, 400]], score=0.4)
    assert (draw_boxes(GREY, NAMES, low) == 128).all()
    assert (draw_boxes(GREY, NAMES, low, least_score=0.4) != 128).any()


def test_what_is_there_is_dashed():
    image = annotation((480, 640), [[100, 200, 300, 400]], [1], difficult=[False])
    line = draw_boxes(GREY, NAMES, found([]), image)[399, 110:290]
    share = np.mean([close(pixel, class_color(1)) for pixel in line])
    assert 0.4 < share < 0.6
    dotted = annotation((480, 640), image.boxes, [1], difficult=[True])
    line_of_dots = draw_boxes(GREY, NAMES, found([]), dotted)[399, 110:290]

    def changes(pixels):
        return np.sum((pixels[1:] != pixels[:-1]).any(-1))

    assert changes(line_of_dots) > 3 * changes(line)
    # Alone, it has a label.
    alone, beside = (
        draw_boxes(GREY, NAMES, None, image),
        draw_boxes(GREY, NAMES, found([]), image),
    )
    assert (alone[150:199] != 128).any()
    assert (beside[150:199] == 128).all()


@pytest.mark.parametrize(
    ("shape", "longer"),
    [((10, 14, 1), 640), ((300, 900, 3), 900), ((3000, 2000, 3), 1280)],
)
def test_pictures_of_any_size(shape, longer):
    image = np.full(shape, 128, np.uint8)
    height, width = shape[:2]
    # At the border, beyond it, of one pixel, and empty.
    boxes = [[0, 0, width, height], [-5, -5, width + 9, 3], [2, 2, 3, 3], [4, 4, 4, 4]]
    truth = annotation((height, width), boxes, [0, 1, 0, 1])
    drawn = draw_boxes(image, NAMES, found(boxes, label=1), truth)
    assert max(drawn.shape) == longer
    assert drawn.dtype == np.uint8
    assert drawn.shape[2] == 3
    middle = np.array(drawn.shape[:2]) // 2
    assert close(drawn[middle[0], 0], class_color(1))


def test_the_colours_of_twenty_classes_differ():
    colors = np.array([class_color(label) for label in range(20)])
    differences = np.abs(colors[:, None] - colors).sum(-1)
    assert differences[np.triu_indices(20, 1)].min() > 50


def test_curves():
    annotations = made_up(1, images=40)
    detections = detected(annotations, 4, 1)
    names = ("a$b", *"bcd", "never there")
    precision = voc_average_precision(annotations, detections, names)
    figure = precision_recall_figure(precision)
    panels = [axes for axes in figure.axes if axes.axison]
    assert len(panels) == 4
    first, axes = precision.classes[0], panels[0]
    assert axes.get_title() == rf"a\$b {100 * first.ap_area:.1f}"
    (line,) = axes.get_lines()
    assert line.get_xdata()[-1] == first.recalls[-1]
    assert set(line.get_ydata()) <= set(first.precisions)
    # The area that is filled is the AP.
    (area,) = axes.collections
    x, y = area.get_paths()[0].vertices.T
    shoelace = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert shoelace == pytest.approx(first.ap_area, abs=1e-9)
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    nothing = voc_average_precision([annotation((9, 9), [], [])], [found([])], ("a",))
    with pytest.raises(UserError, match="no class has an object"):
        precision_recall_figure(nothing)


def test_many_classes_and_points_stay_small():
    boxes = np.tile([[0, 0, 10, 10]], (1000, 1)) + np.arange(1000)[:, None] * 20
    image = annotation((9, 9), boxes, [0] * 1000)
    precision = voc_average_precision([image], [found(boxes)], ("a",))
    (line,) = precision_recall_figure(precision).axes[0].get_lines()
    assert len(line.get_xdata()) == 301
    classes = (
        dataclasses.replace(precision.classes[0], name=str(i)) for i in range(90)
    )
    many = dataclasses.replace(precision, classes=tuple(classes))
    assert len(precision_recall_figure(many).axes) == 80


@dataclasses.dataclass
class Images:
    annotations: list
    class_names: tuple = ("a", "b", "c", "d")
    category_ids: tuple | None = None
    missing: tuple = ("000001",)

    def __len__(self):
        return len(self.annotations)

    def name(self, index):
        return f"{index:06}"

    def annotation(self, index):
        return self.annotations[index]

    def image(self, index):
        assert self.name(index) not in self.missing
        height, width = self.annotations[index].size
        file = io.BytesIO()
        Image.fromarray(GREY[:height, :width]).save(file, "png")
        return file.getvalue()


def test_the_report(tmp_path):
    source = Images(made_up(1, images=30))
    names = [source.name(i) for i in range(30)]
    detections = detected(source.annotations, 4, 1)
    figures, _ = evaluation_result(
        source.annotations, names, source.class_names, None, detections, coco=True
    )
    facts = {
        **{"model": "resnet18", "step": 9, "seed": 0, "parameters": 12, "epoch": 1.0},
        **{"weights": None, "training_images": 5, "global_batch_size": 2},
        **{
            "seconds": 61.0,
            "finished": "today",
            "command": "resnet-jax detect <train>",
        },
        "environment": {"python": "3.11"},
    }
    rows = [
        {"step": step, "train_loss": 1 / step, "test_map_area": 0.1 * step}
        for step in (1, 2)
    ]
    folder = Workdir(tmp_path, DetectionConfig)
    save_detections(tmp_path / DETECTIONS, names, source.class_names, detections)
    data = type("Data", (), {"test": source})()
    write_detection_report(folder, {**figures, **facts}, rows, data)
    page = folder.report.read_text()
    assert headline(figures) in page
    assert page.count("<img") == 12
    assert "000000: " in page
    assert "000001" not in page  # it has no file
    assert page.count("<svg") == 2
    ap = figures["classes"]["a"]["ap_area"]
    assert f'<td class="number">{100 * ap:.2f}</td>' in page
    assert "COCO&#x27;s figures" in page
    assert "detect &lt;train&gt;" in page
    # Of proposals alone there is no precision.
    write_detection_report(folder, facts, rows[:1], data)
    assert "<img" not in folder.report.read_text()


def test_training_curves_have_a_panel_for_the_precision():
    rows = [{"step": step, "train_loss": 1 / step} for step in (1, 2, 3)]
    assert len(detector_curves(rows).axes) == 1
    rows[0]["test_map_area"], rows[2]["test_map_area"] = 0.25, 0.5
    panel = detector_curves(rows).axes[1]
    assert panel.get_lines()[0].get_xydata().tolist() == [[1, 25], [3, 50]]
