"""Detectors that were tested here, for the report beside Tables 7 to 10."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_jax import run_files
from resnet_jax.evaluation.figures import Spread
from resnet_jax.paper.detection import VOC_CLASSES, Benchmark, DetectionTable
from resnet_jax.paper.entries import Table
from resnet_jax.storage import read_text

FOLDER = "detection"
"""Folder of the report's workdir that holds runs of ``resnet-jax detect train``."""

NOTE = (
    "On the whole test set at the last checkpoint: mean and sample standard deviation "
    "over n seeds. Training data and protocol may differ from the published ones."
)

NOT_MEASURED = f"not measured: no run in the folder {FOLDER} was tested on these data"

_FIELDS = {"voc": "an object", "classes": "an object", "images": run_files.NUMBER}
_VOC07_TEST = 4952
_COCO_CLASSES, _COCO_VAL = 80, (5000, 40_504)  # val of 2017 and of 2014


@dataclasses.dataclass(frozen=True)
class Tested:
    """The results of a run, one for each finished seed; see ``evaluation_result``."""

    name: str
    results: Sequence[dict[str, Any]]

    @property
    def benchmark(self) -> Benchmark | None:
        """The published test set that it was tested on, by classes and images."""
        first = self.results[0]
        if set(first["classes"]) == set(VOC_CLASSES):
            return "voc07" if first["images"] == _VOC07_TEST else None
        is_coco = "coco" in first and len(first["classes"]) == _COCO_CLASSES
        return "coco" if is_coco and first["images"] in _COCO_VAL else None

    def spread(self, group: str, name: str) -> str:
        """A figure of all seeds in percent; "" where none has it."""
        values = [result.get(group, {}).get(name) for result in self.results]
        return _spread(values)

    def of_class(self, class_name: str, name: str) -> str:
        """The same for a class."""
        return _spread([each["classes"][class_name].get(name) for each in self.results])


def read_tested(workdir: Path) -> list[Tested]:
    """The tested detectors below the folder of a report.

    Raises:
      UserError: a result is damaged.
    """
    runs = []
    folder = workdir / FOLDER
    for run in sorted(folder.iterdir()) if folder.is_dir() else []:
        files = sorted(run.glob("seed-*/result.json")) or [run / "result.json"]
        texts = [(file, read_text(file)) for file in files]
        results = [
            run_files.parse(str(file), text, _FIELDS) for file, text in texts if text
        ]
        if results:
            runs.append(Tested(run.name, results))
    return runs


def measured_tables(published: DetectionTable, tested: Sequence[Tested]) -> list[Table]:
    """Tables of the detectors that were tested on the data of a published table."""
    fitting = [
        run
        for run in tested
        if published.benchmark and run.benchmark == published.benchmark
    ]
    if not fitting:
        return []
    found = [summary(fitting)]
    if "class" in published.table.header:
        found.append(_by_class(fitting))
    return found


def summary(tested: Sequence[Tested], title: str = "Measured here") -> Table:
    """A row for each detector."""
    columns = {
        "mAP by 11 points (%)": ("voc", "map_11"),
        "mAP by area (%)": ("voc", "map_area"),
        "COCO AP (%)": ("coco", "AP"),
        "AP50 (%)": ("coco", "AP50"),
        "AP75 (%)": ("coco", "AP75"),
    }
    rows = []
    for run in tested:
        first = run.results[0]
        protocol = first.get("protocol", {}).items()
        rows.append(
            [
                run.name,
                *(run.spread(*place) for place in columns.values()),
                str(len(run.results)),
                f"{len(first['classes'])} classes, {first['images']:,} images",
                ", ".join(
                    f"{name.replace('_', ' ')} {value}" for name, value in protocol
                ),
            ]
        )
    header = ["run", *columns, "n", "tested on", "protocol"]
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return Table(
        header=[header[i] for i in kept],
        rows=[[row[i] for i in kept] for row in rows],
        title=title,
        note=NOTE,
    )


def _by_class(tested: Sequence[Tested]) -> Table:
    """A row for each class, and two columns for each detector."""
    names = list(tested[0].results[0]["classes"])
    kinds = {"11 points": "ap_11", "area": "ap_area"}
    return Table(
        header=["class", *(f"{run.name}, {kind}" for run in tested for kind in kinds)],
        rows=[
            [
                name,
                *(run.of_class(name, key) for run in tested for key in kinds.values()),
            ]
            for name in names
        ],
        title="Measured here, AP of each class (%)",
    )


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return str(Spread.of(known)) if known else ""
