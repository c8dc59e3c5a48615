"""Annotations in the layout of PASCAL VOC: an XML file for each image.

    ROOT/Annotations/NAME.xml
    ROOT/JPEGImages/NAME.jpg           or another kind of image
    ROOT/ImageSets/Main/SPLIT.txt      a NAME per line

or both files of each image in one folder, as some tools export them:

    ROOT/SPLIT/NAME.xml
    ROOT/SPLIT/NAME.jpg

The coordinates in the files count pixels from 1 and include the last one. They become
continuous here, and only here: xmin - 1, ymin - 1, xmax, ymax.
"""

import dataclasses
import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_jax.data.sources.base import read_bytes, read_text
from resnet_jax.data.sources.folders import Names, is_image_name, is_leftover
from resnet_jax.detection.annotations import (
    AnnotationTable,
    FileSource,
    Joined,
    Source,
    size_of_file,
)
from resnet_jax.errors import UserError, nearest, some_of

_MOST_BYTES = 2**23  # of an XML file; VOC's largest has 20 KB
_MOST_PIXELS = 2**24  # the whole numbers of float32
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def open_voc(
    root: Path, split: str, class_names: Sequence[str] = (), label: str = "the data"
) -> Source:
    """The images that a split names, in its order.

    Args:
      root: the folder with Annotations, ImageSets and JPEGImages, or with a folder
        VOC2007 and so on for each year.
      split: the name of a list, such as "trainval". "2007/trainval+2012/trainval" joins
        lists in the folders VOC2007 and VOC2012.
      class_names: the classes in their order; () means those found, sorted.
      label: what the given classes come from, for errors.

    Raises:
      UserError: a list, an annotation or a class is missing or wrong. Missing images
        are noticed when they are read.
    """
    parts = [_read_part(root, part) for part in map(str.strip, split.split("+"))]
    if not class_names:
        found = {object_.name for part in parts for object_ in part.objects()}
        class_names = sorted(found)
        if not class_names:
            raise UserError(
                f"no image of split {split} of {root} has an object, so its classes "
                "are unknown; give data.class_names"
            )
    sources = [part.source(tuple(class_names), label) for part in parts]
    return sources[0] if len(sources) == 1 else Joined(sources)


def has_voc(root: Path) -> bool:
    """Whether a folder looks like VOC's layout, or holds folders that do."""
    layouts = ("Annotations/*.xml", "*/Annotations/*.xml", "*/*.xml")
    return any(next(root.glob(layout), None) for layout in layouts)


@dataclasses.dataclass(frozen=True, slots=True)
class _Object:
    name: str
    box: tuple[float, ...]
    difficult: bool


@dataclasses.dataclass(frozen=True)
class _Image:
    name: str
    size: tuple[int, int]
    objects: Sequence[_Object]


@dataclasses.dataclass(frozen=True)
class _Part:
    """The images of one list, and the folder of their annotations."""

    folder: Path
    images: Sequence[_Image]
    files: Sequence[str]

    def objects(self) -> list[_Object]:
        return [each for image in self.images for each in image.objects]

    def source(self, class_names: tuple[str, ...], label: str) -> FileSource:
        class_of = {name: number for number, name in enumerate(class_names)}
        for image in self.images:
            for each in image.objects:
                if each.name not in class_of:
                    raise UserError(
                        f"{self.folder / image.name}.xml has an object of class "
                        f"{each.name[:50]!r}, which is not among those of {label} "
                        f"({some_of(class_names, 20)}); correct it, or list the class "
                        "in data.class_names"
                    )
        objects = self.objects()
        table = AnnotationTable.build(
            [image.size for image in self.images],
            [len(image.objects) for image in self.images],
            [each.box for each in objects],
            [class_of[each.name] for each in objects],
            difficult=[each.difficult for each in objects],
        )
        names = Names(image.name for image in self.images)
        table, notes = table.checked(names.__getitem__)
        return FileSource(names, Names(self.files), table, class_names, notes=notes)


def _read_part(root: Path, part: str) -> _Part:
    """Reads a list and its annotations."""
    year, _, name = part.rpartition("/")
    folder = root
    if year:
        folder = root / f"VOC{year}" if (root / f"VOC{year}").is_dir() else root / year
    beside = folder / name
    if name and next(beside.glob("*.xml"), None):
        names = sorted(file.stem for file in beside.glob("*.xml"))
        return _read_all(names, annotations=beside, images=beside)
    list_ = folder / "ImageSets" / "Main" / f"{name}.txt"
    known = {file.stem for file in list_.parent.glob("*.txt")}
    if name not in known:
        known |= {file.parent.name for file in folder.glob("*/*.xml")} - {"Annotations"}
        raise UserError(f"there is no {list_}{_splits_hint(root, folder, name, known)}")
    names, annotations = _names(list_), folder / "Annotations"
    annotated = {file.name for file in annotations.glob("*.xml")}
    missing = [each for each in names if f"{each}.xml" not in annotated]
    if missing:
        raise UserError(
            f"{list_} names {missing[0][:50]!r}, but {annotations} has no file of that "
            f"name with .xml ({len(missing):,} of {len(names):,} are missing): add the "
            "annotation or correct the list"
        )
    return _read_all(names, annotations, images=folder / "JPEGImages")


def _read_all(names: Sequence[str], annotations: Path, images: Path) -> _Part:
    """Reads the annotations of images."""
    files = _image_files(images)
    paths = [files.get(name, "") for name in names]
    pairs = zip(names, paths, strict=True)
    return _Part(annotations, [_read(annotations, *pair) for pair in pairs], paths)


def _splits_hint(root: Path, folder: Path, name: str, known: set[str]) -> str:
    if known:
        return f": {nearest(name, sorted(known))}"
    years = [each.name.removeprefix("VOC") for each in sorted(root.glob("VOC*"))]
    if folder == root and years:
        return f"; for the lists of {root / 'VOC'}{years[0]}, give {years[0]}/{name}"
    return (
        "; expected a folder with Annotations/NAME.xml, JPEGImages/NAME.jpg and "
        "ImageSets/Main/SPLIT.txt"
    )


def _names(file: Path) -> list[str]:
    """The names in a list, each once."""
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not names:
        raise UserError(f"{file} names no image; write the name of one on each line")
    seen = set()
    for name in names:
        if name in seen:
            raise UserError(f"{file} names the image {name[:50]!r} twice; remove one")
        seen.add(name)
    return names


def _image_files(folder: Path) -> dict[str, str]:
    """The path of each image in a folder by its name without the ending."""
    if not folder.is_dir():
        return {}
    found = sorted(file.name for file in os.scandir(folder))
    images = (name for name in found if is_image_name(name) and not is_leftover(name))
    # Of several endings, the first in alphabetical order counts.
    return {
        os.path.splitext(name)[0]: str(folder / name) for name in reversed([*images])
    }


class _FaultError(ValueError):
    """What is wrong with an annotation."""


class _Tree(ET.TreeBuilder):
    """Refuses document types, since entities can grow without limit."""

    def doctype(self, *_: Any) -> None:
        raise _FaultError("it declares a document type, which annotations do without")


def _read(folder: Path, name: str, image: str) -> _Image:
    file = folder / f"{name}.xml"
    data = read_bytes(str(file), 0, _MOST_BYTES + 1, str(file))
    try:
        root = _parse(data)
        size = _size(root)
        items = enumerate(root.iterfind("object"), 1)
        objects = [_object(item, f"object {number}") for number, item in items]
    except _FaultError as error:
        raise UserError(
            f"{file} is not an annotation as in VOC: {error}; correct it, or remove "
            f"{name} from the split"
        ) from error
    if size is None:
        if not image:
            raise UserError(
                f"{file} states no size, and its image is missing; add one of them"
            )
        size = size_of_file(image)
    return _Image(name, size, objects)


def _parse(data: bytes) -> ET.Element:
    if len(data) > _MOST_BYTES:
        raise _FaultError(f"it has more than {_MOST_BYTES // 2**20} MiB")
    parser = ET.XMLParser(target=_Tree())
    try:
        parser.feed(data)
        root = parser.close()
    except (ET.ParseError, ValueError, LookupError) as error:
        if isinstance(error, _FaultError):
            raise
        raise _FaultError(f"its XML is damaged ({error})") from error
    if root.tag != "annotation":
        raise _FaultError(f"its outermost element is {root.tag[:50]!r}, not annotation")
    return root


def _size(root: ET.Element) -> tuple[int, int] | None:
    """Height and width; None if they are missing or 0, as some tools write them."""
    stated = root.find("size")
    if stated is None:
        return None
    sides = [_number(stated, side, "size") for side in ("height", "width")]
    for side in sides:
        if side != int(side) or side < 0:
            raise _FaultError(f"its size has a side of {side:g} pixels")
    return (int(sides[0]), int(sides[1])) if min(sides) else None


def _object(item: ET.Element, where: str) -> _Object:
    name = _text(item, "name", where)
    box = item.find("bndbox")
    if box is None:
        raise _FaultError(f"{where} has no bndbox")
    x1, y1, x2, y2 = (_number(box, corner, where) for corner in _CORNERS)
    difficult = 0.0
    if (item.findtext("difficult") or "").strip():
        difficult = _number(item, "difficult", where)
        if difficult not in (0, 1):
            raise _FaultError(f"difficult of {where} is {difficult:g}, not 0 or 1")
    return _Object(name, (x1 - 1, y1 - 1, x2, y2), bool(difficult))


def _text(parent: ET.Element, tag: str, where: str) -> str:
    text = (parent.findtext(tag) or "").strip()
    if not text:
        raise _FaultError(f"{where} has no {tag}")
    return text


def _number(parent: ET.Element, tag: str, where: str) -> float:
    text = _text(parent, tag, where)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) < _MOST_PIXELS:
        raise _FaultError(f"{tag} of {where} is {text[:50]!r}, not a number of pixels")
    return number
