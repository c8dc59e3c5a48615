"""What a detector finds in pictures without annotations."""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console

from resnet_jax.analysis.predictions import image_files, json_lines
from resnet_jax.console import make_console, say
from resnet_jax.data.images import to_pillow
from resnet_jax.data.pictures import is_picture, name_of, read_picture
from resnet_jax.detection.annotations import Annotation
from resnet_jax.detection.detections import Detections
from resnet_jax.detection.detector import Given, finder, open_members
from resnet_jax.detection.drawing import draw_boxes
from resnet_jax.errors import UserError

_AT_ONCE = 32
"""Decoded pictures in memory."""


class PictureSource:
    """Decoded pictures as a source without objects."""

    category_ids: tuple[int, ...] | None = None
    image_ids: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, pictures: Sequence[np.ndarray], class_names: tuple[str, ...]):
        self.class_names = class_names
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def name(self, index: int) -> str:
        """See ``Source``."""
        return str(index)

    def annotation(self, index: int) -> Annotation:
        """See ``Source``."""
        size: Any = self._pictures[index].shape[:2]
        none = np.zeros(0, bool)
        boxes, areas = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
        return Annotation(size, boxes, np.zeros(0, np.int32), none, none, areas)

    def image(self, index: int) -> Any:
        """The pixels, which need no decoding."""
        return self._pictures[index]


def detect_pictures(
    detector: Given | Sequence[Given],
    pictures: Any,
    on_fault: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, np.ndarray, Detections]]:
    """Yields the number, pixels and detections of each picture as they are found.

    Pictures are turned upright as their EXIF says. A ``Detector`` keeps what it has
    compiled for later calls; a workdir or an ensemble compiles at each call.

    Args:
      detector: a ``Detector``, or the workdir of a run; or several, an ensemble.
      pictures: paths, Pillow images, or uint8 arrays (h, w) or (h, w, c); or one.
      on_fault: gets a sentence for each broken picture, which is then left out.

    Raises:
      UserError: a picture is broken, and there is no ``on_fault``.
    """
    members = open_members(detector)
    find, class_names = finder(members), members[0].class_names
    numbered = enumerate([pictures] if is_picture(pictures) else pictures)
    while part := list(itertools.islice(numbered, _AT_ONCE)):
        decoded = []
        for number, picture in part:
            try:
                name = name_of(picture, number)
                decoded.append((number, read_picture(picture, 3, name)))
            except UserError as error:
                if on_fault is None:
                    raise
                on_fault(str(error))
        if not decoded:
            continue
        numbers, pixels = zip(*decoded, strict=True)
        found = find(source=PictureSource(pixels, class_names), batch_size=1)
        yield from zip(numbers, pixels, found, strict=True)


def predict_boxes(
    detector: Given | Sequence[Given],
    paths: Sequence[str | os.PathLike[str]],
    *,
    checkpoint: int | str = "last",
    overrides: Mapping[str, str] | None = None,
    score: float = 0.5,
    out: str | os.PathLike[str] | None = None,
    json_path: str | os.PathLike[str] | None = None,
    console: rich.console.Console | None = None,
    faults: rich.console.Console | None = None,
) -> tuple[int, int]:
    """Prints what a detector finds in image files, and draws it.

    Args:
      detector: a ``Detector``, or the workdir of a run; or several, an ensemble, whose
        first one says how all of them are tested.
      paths: image files, and folders, whose images at any depth are taken.
      checkpoint: of each run: "last" or a step.
      overrides: values as text for config fields, as for ``evaluate_detector``.
      score: smallest score that counts.
      out: folder for the pictures with their boxes, as PNG files.
      json_path: file for one JSON object per line: image, and its detections.
      console: None means standard output.
      faults: gets a sentence for each broken image; None means standard error.

    Returns:
      The numbers of pictures, and of broken ones.

    Raises:
      UserError: no picture can be read, or a file cannot be written.
    """
    console = console or make_console()
    faults = faults or rich.console.Console(stderr=True)
    files, broken = image_files(paths)
    for sentence in broken:
        say(faults, f"resnet-jax: {sentence}")

    def on_fault(sentence: str) -> None:
        broken.append(sentence)
        say(faults, f"resnet-jax: {sentence}")

    detectors = open_members(detector, checkpoint, overrides)
    names, count = detectors[0].class_names, 0
    if out is not None:
        os.makedirs(out, exist_ok=True)
    with json_lines(json_path) as write:
        for number, pixels, found in detect_pictures(detectors, files, on_fault):
            count += 1
            found = found.above(score)
            say(console, f"{files[number]}: {_counts(found, names)}")
            write(
                json.dumps({"image": files[number], "detections": found.to_json(names)})
            )
            if out is not None:
                target = Path(out) / f"{number:04d}-{Path(files[number]).stem}.png"
                to_pillow(draw_boxes(pixels, names, found, least_score=score)).save(
                    target
                )
    if not count:
        raise UserError(f"none of the {len(files)} images can be read")
    if out is not None:
        say(console, f"pictures: {out}")
    return count, len(broken)


def _counts(found: Detections, names: Sequence[str]) -> str:
    """What was found, in words: ``3 car, 1 dog``."""
    if not len(found):
        return "nothing"
    counts = np.bincount(found.classes, minlength=len(names))
    return ", ".join(
        f"{count} {name}" for name, count in zip(names, counts, strict=True) if count
    )
