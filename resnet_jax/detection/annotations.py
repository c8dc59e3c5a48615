"""Annotated images: boxes, their classes, and the sources that hold them."""

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import simplejpeg
from numpy.typing import ArrayLike

from resnet_jax.config.schema import MAX_IMAGE_PIXELS
from resnet_jax.data import images
from resnet_jax.data.sources.base import Example, read_bytes
from resnet_jax.data.sources.folders import Names
from resnet_jax.errors import UserError

_ROUNDING = 2.0
"""Pixels by which a box may leave its image unnoticed: tools round and count
differently."""


@dataclasses.dataclass(frozen=True)
class Annotation:
    """The objects in one image, n of them.

    Boxes are x1, y1, x2, y2 in continuous pixel coordinates: a box over a whole image
    of h x w pixels is (0, 0, w, h). They have an area inside the image, but may reach
    out of it, as in the file.

    Attributes:
      size: height and width of the image file.
      boxes: float32 (n, 4).
      classes: int32 (n,), from 0; no class is the background.
      difficult: bool (n,), VOC's mark of objects that evaluation ignores.
      crowd: bool (n,), COCO's mark of boxes around many objects.
      areas: float32 (n,), of COCO's segmentation, else of the box.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray


class Source(Protocol):
    """Annotated images by index.

    Many threads may read a source at once, and it can be sent to a process.

    Attributes:
      class_names: in the order of the classes.
      category_ids: COCO's id of each class; None if there are none.
      image_ids: COCO's id of each image, int64 (n,); None if there are none.
      notes: sentences for the start of a run, such as on boxes that were dropped.
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] | None
    image_ids: np.ndarray | None
    notes: tuple[str, ...]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """VOC's id of an image, or COCO's file name."""

    def annotation(self, index: int) -> Annotation:
        """The objects in an image."""

    def image(self, index: int) -> bytes:
        """The encoded image.

        Raises:
          UserError: it cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class AnnotationTable:
    """The annotations of n images with m objects, in a few arrays.

    Attributes:
      sizes: int32 (n, 2), height and width.
      ends: int64 (n,); the objects of image i end before ``ends[i]``.
      boxes: float32 (m, 4).
      classes: int32 (m,).
      difficult: bool (m,).
      crowd: bool (m,).
      areas: float32 (m,).
    """

    sizes: np.ndarray
    ends: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray

    @classmethod
    def build(
        cls,
        sizes: ArrayLike,
        counts: ArrayLike,
        boxes: ArrayLike,
        classes: ArrayLike,
        difficult: ArrayLike | None = None,
        crowd: ArrayLike | None = None,
        areas: ArrayLike | None = None,
    ) -> "AnnotationTable":
        """The table of lists over all images (``sizes``, ``counts``) and objects."""
        corners = np.asarray(boxes, np.float32).reshape(-1, 4)
        nowhere = np.zeros(len(corners), bool)
        if areas is None:
            areas = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
        return cls(
            np.asarray(sizes, np.int32).reshape(-1, 2),
            np.cumsum(np.asarray(counts, np.int64)),
            corners,
            np.asarray(classes, np.int32),
            nowhere if difficult is None else np.asarray(difficult, bool),
            nowhere if crowd is None else np.asarray(crowd, bool),
            np.asarray(areas, np.float32),
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Annotation:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = int(self.ends[index - 1]) if index else 0
        part = slice(start, int(self.ends[index]))
        height, width = map(int, self.sizes[index])
        return Annotation((height, width), *(each[part] for each in self._objects()))

    def _objects(self) -> tuple[np.ndarray, ...]:
        return self.boxes, self.classes, self.difficult, self.crowd, self.areas

    def checked(
        self, name: Callable[[int], str]
    ) -> tuple["AnnotationTable", tuple[str, ...]]:
        """The table without boxes that have no area inside their image, and notes.

        Args:
          name: names an image in the notes.
        """
        counts = np.diff(self.ends, prepend=0)
        owners = np.repeat(np.arange(len(self)), counts)
        corner = self.sizes[owners][:, ::-1].astype(np.float32)
        low, high = self.boxes[:, :2], self.boxes[:, 2:]
        inside = np.minimum(high, corner) - np.maximum(low, 0)
        kept = (inside > 0).all(axis=1)
        notes = []
        if not kept.all():
            first = name(int(owners[np.argmin(kept)]))
            notes.append(
                f"{_number(~kept, 'box has', 'boxes have')} no area inside the image "
                f"and left out, the first in {first}"
            )
        outside = np.maximum(-low, high - corner).max(axis=1, initial=0) > _ROUNDING
        outside &= kept
        if outside.any():
            first = name(int(owners[np.argmax(outside)]))
            notes.append(
                f"{_number(outside, 'box reaches', 'boxes reach')} out of the image by "
                f"more than {_ROUNDING:.0f} pixels, the first in {first}: training "
                "clips them"
            )
        counts = np.bincount(owners[kept], minlength=len(self))
        parts = (each[kept] for each in self._objects())
        return AnnotationTable(self.sizes, np.cumsum(counts), *parts), tuple(notes)

    def checksum(self) -> str:
        """SHA-256 of all annotations."""
        digest = hashlib.sha256()
        for array in (self.sizes, self.ends, *self._objects()):
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()


def _number(chosen: np.ndarray, one: str, many: str) -> str:
    count = int(chosen.sum())
    return f"{count:,} {one if count == 1 else many}"


@dataclasses.dataclass(eq=False)
class FileSource:
    """Image files with a table of annotations; see ``Source``.

    Attributes:
      names: of the images.
      files: their paths; empty where no file was found.
      table: their annotations.
    """

    names: Names
    files: Names
    table: AnnotationTable
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] | None = None
    image_ids: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def missing(self) -> list[str]:
        """Names of the images without a file."""
        return [self.names[i] for i in range(len(self)) if not self.files[i]]

    def name(self, index: int) -> str:
        """See ``Source``."""
        return self.names[index]

    def annotation(self, index: int) -> Annotation:
        """See ``Source``."""
        return self.table[index]

    def image(self, index: int) -> bytes:
        """See ``Source``."""
        file = self.files[index]
        if not file:
            raise UserError(
                f"image {self.names[index]} has an annotation, but no file; add the "
                "file, or remove the image from the split"
            )
        return read_bytes(file, 0, -1, f"image {file}")


class Joined:
    """Several sources with the same classes, one after the other; see ``Source``."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = list(sources)
        self._ends = list(itertools.accumulate(map(len, sources)))
        self.class_names = sources[0].class_names
        self.category_ids = sources[0].category_ids
        ids = [each.image_ids for each in sources]
        found = [each for each in ids if each is not None]
        self.image_ids = np.concatenate(found) if len(found) == len(ids) else None
        self.notes = tuple(note for each in sources for note in each.notes)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def missing(self) -> list[str]:
        """Names of the images without a file."""
        return [name for each in self._sources for name in missing(each)]

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)

    def name(self, index: int) -> str:
        """See ``Source``."""
        source, place = self._find(index)
        return source.name(place)

    def annotation(self, index: int) -> Annotation:
        """See ``Source``."""
        source, place = self._find(index)
        return source.annotation(place)

    def image(self, index: int) -> bytes:
        """See ``Source``."""
        source, place = self._find(index)
        return source.image(place)


def missing(source: Source) -> list[str]:
    """Names of the images that a source lists, but cannot read."""
    return getattr(source, "missing", [])


def decode(
    source: Source, index: int, max_pixels: int = MAX_IMAGE_PIXELS
) -> np.ndarray:
    """The image of an example as uint8 (h, w, 3).

    Raises:
      UserError: it cannot be read or decoded, or has another size than its annotation
        states, so that the boxes are those of another picture.
    """
    name = source.name(index)
    pixels = images.decode(Example(source.image(index), 0, name), 3, max_pixels)
    check_size(name, pixels.shape[:2], source.annotation(index).size)
    return pixels


def check_size(name: str, found: tuple[int, ...], stated: tuple[int, int]) -> None:
    """Raises UserError if an image has another size than its annotation states."""
    if found != stated:
        why = ""
        if found == stated[::-1]:
            why = ", perhaps by the rotation in its EXIF data, which is not applied"
        raise UserError(
            f"image {name} is {found[1]} x {found[0]}, but its annotation states "
            f"{stated[1]} x {stated[0]}{why}: correct the annotation, or save the "
            "image upright (mogrify -auto-orient)"
        )


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Height and width of an encoded image, for annotations that do not state them.

    Raises:
      UserError: it cannot be decoded.
    """
    with contextlib.suppress(ValueError):  # no JPEG: decode it
        return simplejpeg.decode_jpeg_header(data)[:2]
    height, width = images.decode(Example(data, 0, name), 1).shape[:2]
    return height, width


def size_of_file(file: str) -> tuple[int, int]:
    """The size of an image file.

    Raises:
      UserError: it cannot be read or decoded.
    """
    return image_size(read_bytes(file, 0, -1, f"image {file}"), file)
