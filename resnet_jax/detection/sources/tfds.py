"""Annotated images of tensorflow_datasets, such as voc/2007 and coco/2017.

They are read from ArrayRecord without TensorFlow. A box is ymin, xmin, ymax, xmax
relative to the image, whose size is not stored: all records are read once to find it.
``prepare_detection`` does so for good.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import Any

import numpy as np

from resnet_jax.data.sources.base import refuse_special
from resnet_jax.data.sources.folders import Names
from resnet_jax.data.sources.tfds import prepared_builder
from resnet_jax.detection.annotations import Annotation, AnnotationTable, image_size
from resnet_jax.environment import usable_cores
from resnet_jax.errors import UserError, some_of

_DECIMALS = 3
"""Of a pixel: float32 has kept them of a relative coordinate, and files give two."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Records:
    """The records of a split, by index.

    Attributes:
      stored: reads and parses them.
      name: of the split.
    """

    stored: Sequence[Mapping[str, Any]]
    name: str

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            return self.stored[index]
        except Exception as error:  # of array_record and tfds, of many kinds
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"record {self.name}[{index}] of tfds is missing or damaged: {reason}; "
                "prepare the data set again"
            ) from error


@dataclasses.dataclass(eq=False)
class TfdsSource:
    """A split of a tfds data set; see ``Source``."""

    records: "_Records"
    image_key: str
    names: Names
    table: AnnotationTable
    class_names: tuple[str, ...]
    image_ids: np.ndarray | None
    notes: tuple[str, ...]
    category_ids: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        """See ``Source``."""
        return self.names[index]

    def annotation(self, index: int) -> Annotation:
        """See ``Source``."""
        return self.table[index]

    def image(self, index: int) -> bytes:
        """See ``Source``."""
        return self.records[index][self.image_key]


class _Features:
    """Where a data set keeps images, boxes and classes."""

    def __init__(self, builder: Any):
        import tensorflow_datasets as tfds

        features = builder.info.features
        self.image, self.objects = "", ""
        for key, feature in features.items():
            if isinstance(feature, tfds.features.Image) and not self.image:
                self.image = key
            inner = getattr(feature, "feature", None)
            if isinstance(inner, tfds.features.FeaturesDict):
                boxes = _first(inner, tfds.features.BBoxFeature)
                labels = _first(inner, tfds.features.ClassLabel)
                if boxes and labels and not self.objects:
                    self.objects, self.box, self.label = key, boxes, labels
        if not self.image or not self.objects:
            raise UserError(
                f"tfds data set {builder.info.name} has the features "
                f"{', '.join(features)}: expected an image and a sequence of objects "
                "with a box and a class"
            )
        inner = features[self.objects].feature
        order = getattr(inner[self.box], "bbox_format", None)
        if order is not None and order.name != "REL_YXYX":
            raise UserError(
                f"tfds data set {builder.info.name} has boxes as {order.name}; "
                "expected REL_YXYX"
            )
        self.class_names = tuple(inner[self.label].names)
        self.decoders = {self.image: tfds.decode.SkipDecoding()}


def _first(features: Any, kind: type) -> str | None:
    return next((key for key, each in features.items() if isinstance(each, kind)), None)


def open_tfds_detection(
    name: str, data_dir: str | None, split: str, class_names: Sequence[str] = ()
) -> TfdsSource:
    """A split of the data set ``NAME`` or ``NAME:VERSION`` below ``data_dir``.

    Args:
      name: such as "voc/2007".
      data_dir: a folder; None means tfds's default.
      split: of tfds, such as "train+validation" or "train[:90%]".
      class_names: the classes in another order; () means tfds's.

    Raises:
      UserError: there is no such data set or split, or it is damaged.
    """
    builder = prepared_builder(name, data_dir)
    features = _Features(builder)
    class_names = tuple(class_names) or features.class_names
    if sorted(class_names) != sorted(features.class_names):
        raise UserError(
            f"tfds data set {name} has the classes "
            f"{some_of(features.class_names, 20)}; data.class_names must be the same "
            "in another order"
        )
    records = _open_records(builder, name, split, features)
    # Pixels that VOC's files count from 1 were divided as they are.
    shift = 1.0 if builder.name == "voc" else 0.0

    def read(index: int) -> _Record:
        return _read(records[index], features, f"{records.name}[{index}]", shift)

    with ThreadPoolExecutor(usable_cores()) as pool:
        found = list(pool.map(read, range(len(records))))
    class_of = np.array([class_names.index(each) for each in features.class_names])
    names = Names(each.name for each in found)
    table, notes = _table(found, class_of).checked(names.__getitem__)
    ids = [each.image_id for each in found if each.image_id is not None]
    return TfdsSource(
        records,
        features.image,
        names,
        table,
        class_names,
        np.array(ids, np.int64) if len(ids) == len(found) else None,
        notes,
    )


def _open_records(builder: Any, name: str, split: str, features: _Features) -> _Records:
    try:
        for file in builder.info.splits[split].filepaths:
            refuse_special(file)
        stored = builder.as_data_source(split=split, decoders=features.decoders)
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(
            f"tfds data set {name} has no split {split!r}; its splits are "
            f"{', '.join(builder.info.splits)}"
        ) from error
    return _Records(stored, f"{builder.info.full_name}/{split}")


@dataclasses.dataclass(frozen=True)
class _Record:
    name: str
    image_id: int | None
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray


def _table(found: Sequence[_Record], class_of: np.ndarray) -> AnnotationTable:
    """The annotations of all records; ``class_of`` maps tfds's labels."""
    return AnnotationTable.build(
        [each.size for each in found],
        [len(each.boxes) for each in found],
        np.concatenate([each.boxes for each in found]),
        class_of[np.concatenate([each.labels for each in found])],
        np.concatenate([each.difficult for each in found]),
        np.concatenate([each.crowd for each in found]),
        np.concatenate([each.areas for each in found]),
    )


def _read(
    record: Mapping[str, Any], features: _Features, name: str, shift: float
) -> _Record:
    """The annotation of a record, with the size of its image."""
    size = image_size(record[features.image], name)
    objects = record[features.objects]
    relative = np.asarray(objects[features.box], np.float64).reshape(-1, 4)
    height, width = size
    scaled = relative[:, [1, 0, 3, 2]] * (width, height, width, height)
    boxes = np.round(scaled, _DECIMALS) - (shift, shift, 0, 0)
    labels = np.asarray(objects[features.label], np.int64)
    known = (labels >= 0) & (labels < len(features.class_names))
    if not np.isfinite(boxes).all() or not known.all():
        raise UserError(
            f"record {name} of tfds has an object without a box or a class; prepare "
            "the data set again"
        )
    nowhere = np.zeros(len(boxes), bool)
    file = record.get("image/filename", name.encode())
    number = record.get("image/id")
    return _Record(
        name=_text(file) if shift == 0 else PurePath(_text(file)).stem,
        image_id=None if number is None else int(number),
        size=size,
        boxes=boxes,
        labels=labels,
        difficult=np.asarray(objects.get("is_difficult", nowhere), bool),
        crowd=np.asarray(objects.get("is_crowd", nowhere), bool),
        areas=np.asarray(
            objects.get("area", np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)),
            np.float32,
        ),
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
