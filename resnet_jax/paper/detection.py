"""Tables 7 to 14 of the paper: detection and localisation, as published.

Mean average precisions and errors are in percent.
"""

import dataclasses
from typing import Literal

from resnet_jax.paper.entries import Table

Benchmark = Literal["voc07", "coco"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle"),
    *("bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person"),
    *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclasses.dataclass(frozen=True)
class DetectionTable:
    """A published table.

    Attributes:
      name: its name on the command line.
      title: one line for listings and reports.
      shows: the finding, in a sentence.
      protocol: how the numbers were measured.
      table: the numbers; empty where none was published.
      benchmark: data on which detectors tested here can be compared with it; None if
        its test set is closed or its task is not built here.
    """

    name: str
    title: str
    shows: str
    protocol: str
    table: Table
    benchmark: Benchmark | None = None


SOURCE = "He et al. 2015"

_SYSTEM = (
    "Faster R-CNN with conv1 to conv4_x shared, RoI pooling before conv5_1, batch "
    "statistics of ImageNet kept, 300 proposals, shorter side 600."
)
_IMPROVED = (
    "baseline+++ has box refinement, context and multi-scale testing, and is tuned on "
    "VOC from the model of COCO."
)


def _by_class(
    data: tuple[str, str], vgg: list[float], resnet: list[float], improved: list[float]
) -> Table:
    """A row for the mean and for each class; a column for each system."""
    plain, with_coco = data
    rows = zip(("mean", *VOC_CLASSES), vgg, resnet, improved, strict=True)
    return Table(
        header=(
            "class",
            f"VGG-16, {plain}",
            f"ResNet-101, {plain}",
            f"ResNet-101 baseline+++, {with_coco}",
        ),
        rows=[(name, *(f"{value:.1f}" for value in values)) for name, *values in rows],
    )


DETECTION_TABLES = (
    DetectionTable(
        name="table7",
        title="Table 7: mAP on PASCAL VOC 2007 and 2012, VGG-16 and ResNet-101",
        shows="In the same detector ResNet-101 is more than 3 points better than "
        "VGG-16.",
        protocol=f"{_SYSTEM} mAP at IoU 0.5. 07+12: the trainval images of both "
        "years, tested on VOC 2007 test; 07++12: VOC 2007 trainval and test and VOC "
        "2012 trainval, tested by the server on VOC 2012 test. The paper does not say "
        "which AP this is: VOC 2007 defined the one by 11 points, VOC 2012 the area.",
        table=Table(
            ("", "07+12, VOC 2007 test", "07++12, VOC 2012 test"),
            [("VGG-16", "73.2", "70.4"), ("ResNet-101", "76.4", "73.8")],
        ),
        benchmark="voc07",
    ),
    DetectionTable(
        name="table8",
        title="Table 8: mAP on COCO validation, VGG-16 and ResNet-101",
        shows="ResNet-101 gains 6.0 points of COCO's AP, 28 % relative.",
        protocol=f"{_SYSTEM} Trained on the 80k images of train, tested on the 40k of "
        "val (2014).",
        table=Table(
            ("", "mAP @.5", "mAP @[.5, .95]"),
            [("VGG-16", "41.5", "21.2"), ("ResNet-101", "48.4", "27.2")],
        ),
        benchmark="coco",
    ),
    DetectionTable(
        name="table9",
        title="Table 9: improvements of Faster R-CNN on COCO",
        shows="Box refinement, global context, tests at several scales and an ensemble "
        "each add to the baseline.",
        protocol="mAP. ResNet-101 unless the row says VGG-16; each row adds to the one "
        "above. val: trained on train (80k), tested on val (40k). test-dev: trained on "
        "trainval (120k), tested by the server on test-dev (20k). The ensemble has 3 "
        "nets.",
        table=Table(
            (
                "",
                *("val @.5", "val @[.5, .95]"),
                *("test-dev @.5", "test-dev @[.5, .95]"),
            ),
            [
                ("baseline, VGG-16", "41.5", "21.2", "", ""),
                ("baseline, ResNet-101", "48.4", "27.2", "", ""),
                ("+ box refinement", "49.9", "29.9", "", ""),
                ("+ context", "51.1", "30.0", "53.3", "32.2"),
                ("+ multi-scale testing", "53.8", "32.5", "55.7", "34.9"),
                ("ensemble", "", "", "59.0", "37.4"),
            ],
        ),
        benchmark="coco",
    ),
    DetectionTable(
        name="table10",
        title="Table 10: AP of each class on PASCAL VOC 2007 test",
        shows="The means are those of Table 7; the improvements and COCO's images add "
        "9 points.",
        protocol=f"As Table 7; {_IMPROVED}",
        table=_by_class(
            ("07+12", "COCO+07+12"),
            [
                *(73.2, 76.5, 79.0, 70.9, 65.5, 52.1, 83.1, 84.7, 86.4, 52.0, 81.9),
                *(65.7, 84.8, 84.6, 77.5, 76.7, 38.8, 73.6, 73.9, 83.0, 72.6),
            ],
            [
                *(76.4, 79.8, 80.7, 76.2, 68.3, 55.9, 85.1, 85.3, 89.8, 56.7, 87.8),
                *(69.4, 88.3, 88.9, 80.9, 78.4, 41.7, 78.6, 79.8, 85.3, 72.0),
            ],
            [
                *(85.6, 90.0, 89.6, 87.8, 80.8, 76.1, 89.9, 89.9, 89.6, 75.5, 90.0),
                *(80.7, 89.6, 90.3, 89.1, 88.7, 65.4, 88.1, 85.6, 89.0, 86.8),
            ],
        ),
        benchmark="voc07",
    ),
    DetectionTable(
        name="table11",
        title="Table 11: AP of each class on PASCAL VOC 2012 test",
        shows="The means are those of Table 7; the improvements and COCO's images add "
        "10 points.",
        protocol=f"As Table 7, by the server; {_IMPROVED}",
        table=_by_class(
            ("07++12", "COCO+07++12"),
            [
                *(70.4, 84.9, 79.8, 74.3, 53.9, 49.8, 77.5, 75.9, 88.5, 45.6, 77.1),
                *(55.3, 86.9, 81.7, 80.9, 79.6, 40.1, 72.6, 60.9, 81.2, 61.5),
            ],
            [
                *(73.8, 86.5, 81.6, 77.2, 58.0, 51.0, 78.6, 76.6, 93.2, 48.6, 80.4),
                *(59.0, 92.1, 85.3, 84.8, 80.7, 48.1, 77.3, 66.5, 84.7, 65.6),
            ],
            [
                *(83.8, 92.1, 88.4, 84.8, 75.9, 71.4, 86.3, 87.8, 94.2, 66.8, 89.4),
                *(69.2, 93.9, 91.9, 90.9, 89.6, 67.9, 88.2, 76.8, 90.3, 80.0),
            ],
        ),
    ),
    DetectionTable(
        name="table12",
        title="Table 12: mAP on ImageNet detection (DET)",
        shows="The detector of Table 9 also won ImageNet's detection task of 2015.",
        protocol="200 classes, mAP at IoU 0.5. ResNet-101 with the improvements of "
        "Table 9, trained on the DET training set and the first half of its "
        "validation set (val1), tested on the other half (val2) and by the server. The "
        "ensemble has 3 nets.",
        table=Table(
            ("", "val2", "test"),
            [
                ("GoogLeNet (ILSVRC'14)", "", "43.9"),
                ("single model", "60.5", "58.8"),
                ("ensemble", "63.6", "62.1"),
            ],
        ),
    ),
    DetectionTable(
        name="table13",
        title="Table 13: localisation error on ImageNet validation",
        shows="ResNet-101 more than halves VGG-16's error, and R-CNN on its proposals "
        "lowers it further.",
        protocol="Each class has a box regressor of its own. Its box is tested for the "
        "right class, if that is given, or for the five classes that a net predicts. "
        "1-crop: the centre crop of 224 pixels; dense: fully convolutional, at several "
        "scales.",
        table=Table(
            ("", "net", "testing", "classes", "error"),
            [
                ("VGG's", "VGG-16", "1-crop", "given", "33.1"),
                ("RPN", "ResNet-101", "1-crop", "given", "13.3"),
                ("RPN", "ResNet-101", "dense", "given", "11.7"),
                ("RPN", "ResNet-101", "dense", "top-5 of ResNet-101", "14.4"),
                ("RPN + R-CNN", "ResNet-101", "dense", "top-5 of ResNet-101", "10.6"),
                ("RPN + R-CNN", "ensemble", "dense", "top-5 of an ensemble", "8.9"),
            ],
        ),
    ),
    DetectionTable(
        name="table14",
        title="Table 14: localisation error on ImageNet, top-5, with other methods",
        shows="64 % less error than the best of 2014.",
        protocol="Top-5 localisation error with predicted classes; the test set by the "
        "server.",
        table=Table(
            ("", "validation", "test"),
            [
                ("OverFeat (ILSVRC'13)", "30.0", "29.9"),
                ("GoogLeNet (ILSVRC'14)", "", "26.7"),
                ("VGG (ILSVRC'14)", "26.9", "25.3"),
                ("ResNet (ILSVRC'15)", "8.9", "9.0"),
            ],
        ),
    ),
)
