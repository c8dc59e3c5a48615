"""Annotated images that ``prepare_detection`` has stored.

The shards and the manifest are those of ``resnet-jax prepare``; the label of each
record is -1. Beside them, ``SPLIT.annotations.npz`` holds the arrays of an
``AnnotationTable``, the ``names`` as a list in JSON, and, from COCO, ``image_ids``.
"""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from resnet_jax.data.sources.base import Source as Images
from resnet_jax.data.sources.base import refuse_special
from resnet_jax.data.sources.folders import Names
from resnet_jax.data.sources.records import open_records
from resnet_jax.detection.annotations import (
    Annotation,
    AnnotationTable,
    Joined,
    Source,
)
from resnet_jax.errors import UserError, nearest
from resnet_jax.storage import reached

UNLABELLED = -1
"""The label in the records."""


def stored_name(split: str) -> str:
    """The name under which a split is stored: 2007_trainval for "2007/trainval"."""
    return re.sub(r"[^\w.-]", "_", split)


_FIELDS = tuple(field.name for field in dataclasses.fields(AnnotationTable))


class PreparedSource:
    """A split of a prepared data set; see ``Source``."""

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        images: Images,
        names: Names,
        table: AnnotationTable,
        class_names: tuple[str, ...],
        category_ids: tuple[int, ...] | None,
        image_ids: np.ndarray | None,
    ):
        """``images``, ``names`` and ``table`` belong together."""
        self._images, self._names, self._table = images, names, table
        self.class_names = class_names
        self.category_ids, self.image_ids = category_ids, image_ids

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        """See ``Source``."""
        return self._names[index]

    def annotation(self, index: int) -> Annotation:
        """See ``Source``."""
        return self._table[index]

    def image(self, index: int) -> bytes:
        """See ``Source``."""
        image = self._images[index].image
        assert isinstance(image, bytes)
        return image


def open_prepared(
    root: Path, manifest: Mapping[str, Any], split: str, class_names: Sequence[str] = ()
) -> Source:
    """The images of a split, or of several joined by "+".

    Args:
      root: the folder.
      manifest: of the folder.
      split: as it was given to ``prepare_detection``.
      class_names: must be the classes of the data, if given.

    Raises:
      UserError: there is no such split, or a file is damaged.
    """
    if "annotations" not in manifest:
        raise UserError(
            f"{root} was prepared for classification: its images have no boxes; "
            "prepare the data with resnet-jax detect prepare"
        )
    own = tuple(manifest["class_names"])
    if class_names and tuple(class_names) != own:
        raise UserError(
            f"{root} was prepared with the classes {', '.join(own)}: data.class_names "
            "cannot be changed later; prepare the data again"
        )
    parts = [
        _open_part(root, manifest, stored_name(part))
        for part in map(str.strip, split.split("+"))
    ]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _open_part(root: Path, manifest: Mapping[str, Any], split: str) -> PreparedSource:
    collection = open_records(epath.Path(root), manifest, labelled=False)
    if split not in manifest["splits"]:
        known = list(manifest["splits"])
        raise UserError(f"{root} has no split {split!r}: {nearest(split, known)}")
    annotations = manifest["annotations"]
    numbers = annotations.get("category_ids")
    names, table, image_ids = _load(root, annotations["files"][split])
    return PreparedSource(
        collection.open_split(split),
        names,
        table,
        tuple(manifest["class_names"]),
        None if numbers is None else tuple(numbers),
        image_ids,
    )


def _load(
    root: Path, entry: Mapping[str, Any]
) -> tuple[Names, AnnotationTable, np.ndarray | None]:
    """The names, annotations and ids of images that ``dump`` wrote."""
    file = epath.Path(root) / entry["file"]
    refuse_special(file)
    try:
        with reached(file):
            content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); copy it again, or prepare the "
            "data again"
        ) from error
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise UserError(
            f"{file} is damaged: its checksum differs; copy it again, or prepare the "
            "data again"
        )
    with np.load(io.BytesIO(content)) as arrays:
        table = AnnotationTable(**{name: arrays[name] for name in _FIELDS})
        names = Names(json.loads(arrays["names"].tobytes()))
        return names, table, arrays.get("image_ids")


def dump(
    names: Sequence[str], table: AnnotationTable, image_ids: np.ndarray | None
) -> bytes:
    """The content of an annotations file, the same for the same annotations."""
    arrays: dict[str, Any] = {name: getattr(table, name) for name in _FIELDS}
    arrays["names"] = np.frombuffer(json.dumps(list(names)).encode(), np.uint8)
    if image_ids is not None:
        arrays["image_ids"] = image_ids
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()
