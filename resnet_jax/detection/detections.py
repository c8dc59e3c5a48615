"""What a detector found in an image, and the files that hold it."""

import dataclasses
import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from resnet_jax.errors import UserError
from resnet_jax.storage import is_remote, locate, open_regular, reached, writing

_DAMAGED = (
    *(ValueError, KeyError, EOFError, TypeError, OSError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What reading a file that is no whole npz raises."""


@dataclasses.dataclass(frozen=True)
class Detections:
    """The objects found in one image, by falling score; ties keep their order.

    Attributes:
      boxes: float32 (n, 4), x1, y1, x2, y2 in pixels of the original image.
      scores: float32 (n,).
      classes: int32 (n,), from 0.

    Raises:
      UserError: the shapes do not fit each other, or a number is not finite.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes, np.float32)
        scores = np.asarray(self.scores, np.float32)
        classes = np.asarray(self.classes, np.int32)
        if boxes.size == 0:
            boxes = boxes.reshape(0, 4)
        count = (len(boxes),)
        if boxes.shape != (*count, 4) or {scores.shape, classes.shape} != {count}:
            raise UserError(
                f"detections have boxes {boxes.shape}, scores {scores.shape} and "
                f"classes {classes.shape}; expected (n, 4), (n,) and (n,)"
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise UserError(
                "detections have boxes or scores that are not finite; the net may "
                "have diverged: look at its training loss"
            )
        order = np.argsort(-scores, kind="stable")
        for name, values in zip(
            ("boxes", "scores", "classes"), (boxes, scores, classes), strict=True
        ):
            object.__setattr__(self, name, values[order])

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> "Detections":
        """The detections with at least a score."""
        keep = self.scores >= score
        return Detections(self.boxes[keep], self.scores[keep], self.classes[keep])

    def to_json(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """One object for each detection: class, score and box (x1, y1, x2, y2)."""
        # Through text, a float32 is as short as it can be: 0.9, not 0.8999999761581421.
        return [
            {
                "class": class_names[label],
                "score": float(str(score)),
                "box": [float(str(value)) for value in box],
            }
            for box, score, label in zip(
                self.boxes, self.scores, self.classes, strict=True
            )
        ]


def save_detections(
    path: str | os.PathLike[str],
    names: Sequence[str],
    class_names: Sequence[str],
    detections: Sequence[Detections],
) -> None:
    """Writes the detections of a data set as one npz file.

    It holds ``names`` and ``counts`` (images,), ``class_names``, and ``boxes``,
    ``scores`` and ``classes`` of all images one after another.

    Args:
      path: of the file; or a URL.
      names: of the images.
      class_names: by class.
      detections: of each image.

    Raises:
      UserError: the file cannot be written.
    """
    fields = {
        "boxes": np.zeros((0, 4), np.float32),
        "scores": np.zeros(0, np.float32),
        "classes": np.zeros(0, np.int32),
    }
    arrays: Any = {
        field: np.concatenate([none, *(getattr(found, field) for found in detections)])
        for field, none in fields.items()
    }
    content = io.BytesIO()
    np.savez_compressed(
        content,
        names=np.array(list(names), str),
        class_names=np.array(list(class_names), str),
        counts=np.array([len(found) for found in detections], np.int64),
        **arrays,
    )
    if is_remote(path):
        with reached(locate(path)):
            locate(path).write_bytes(content.getvalue())
        return
    with writing(path) as temporary:
        temporary.write_bytes(content.getvalue())


def load_detections(
    path: str | os.PathLike[str],
) -> tuple[tuple[str, ...], tuple[str, ...], list[Detections]]:
    """The names of images, the class names and the detections of a file.

    Raises:
      UserError: the file is missing, or not one of ``save_detections``.
    """
    try:
        with _opened(path) as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        ends = np.cumsum(arrays["counts"])[:-1]
        boxes, scores, classes = (
            np.split(arrays[name], ends) for name in ("boxes", "scores", "classes")
        )
        parts = zip(boxes, scores, classes, strict=True)
        names = tuple(map(str, arrays["names"]))
        detections = [Detections(*part) for part in parts] if names else []
        return names, tuple(map(str, arrays["class_names"])), detections
    except _DAMAGED as error:
        raise UserError(
            f"{Path(path)} is missing, damaged or no file of detections: delete it and "
            "result.json beside it, and resnet-jax detect train writes both again"
        ) from error


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    if is_remote(path):
        with reached(locate(path)):
            return io.BytesIO(locate(path).read_bytes())
    return open_regular(path)
