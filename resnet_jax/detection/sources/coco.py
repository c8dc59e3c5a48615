"""Annotations in the layout of COCO: one JSON file for all images of a split.

    ROOT/annotations/instances_SPLIT.json
    ROOT/SPLIT/FILE_NAME               or ROOT/images/SPLIT, or ROOT/images

or all in one folder, as some tools export them:

    ROOT/SPLIT/_annotations.coco.json
    ROOT/SPLIT/FILE_NAME

A box is x, y, width, height in continuous pixel coordinates. The ids of categories have
gaps; the classes here are 0 to K - 1 in increasing id.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data.sources.base import read_bytes
from resnet_jax.data.sources.folders import Names
from resnet_jax.detection.annotations import (
    AnnotationTable,
    FileSource,
    Joined,
    Source,
    size_of_file,
)
from resnet_jax.errors import UserError, nearest

_PREFIX = "instances_"
_BESIDE = "_annotations.coco.json"
_MOST_PIXELS = 2**24  # the whole numbers of float32


def open_coco(root: Path, split: str, class_names: Sequence[str] = ()) -> Source:
    """The images of a split, those without objects included, in the file's order.

    Args:
      root: the folder with ``annotations``.
      split: such as "train2017"; "train2014+val2014" joins two.
      class_names: the categories in another order; () means by increasing id.

    Raises:
      UserError: the file is missing or damaged, or has other categories. Missing images
        are noticed when they are read.
    """
    sources: list[FileSource] = []
    for part in map(str.strip, split.split("+")):
        sources.append(_read_part(root, part, tuple(class_names)))
        class_names = sources[0].class_names
        if sources[-1].category_ids != sources[0].category_ids:
            raise UserError(
                f"the parts of split {split} of {root} number their categories "
                "differently; give them the same ids"
            )
    return sources[0] if len(sources) == 1 else Joined(sources)


def has_coco(root: Path) -> bool:
    """Whether a folder looks like COCO's layout."""
    return any(root.glob(f"annotations/{_PREFIX}*.json")) or any(
        root.glob(f"*/{_BESIDE}")
    )


class _FaultError(ValueError):
    """What is wrong with a file."""


def _read_part(root: Path, split: str, class_names: tuple[str, ...]) -> FileSource:
    file, folder = root / split / _BESIDE, root / split
    if not file.exists():
        file = root / "annotations" / f"{_PREFIX}{split}.json"
        stems = [each.stem for each in file.parent.glob(f"{_PREFIX}*.json")]
        known = sorted(stem.removeprefix(_PREFIX) for stem in stems)
        if split not in known:
            hint = nearest(split, known) if known else "expected COCO's layout"
            raise UserError(f"there is no {file}: {hint}")
        candidates = (root / split, root / "images" / split, root / "images")
        folder = next((each for each in candidates if each.is_dir()), folder)
    try:
        return _source(_load(file), folder, class_names)
    except _FaultError as error:
        raise UserError(
            f"{file} is not in COCO's format: {error}; correct it"
        ) from error


def _load(file: Path) -> dict[str, Any]:
    data = read_bytes(str(file), 0, -1, str(file))
    try:
        content = json.loads(data, object_hook=_without_outlines)
    except (ValueError, RecursionError) as error:
        raise _FaultError(f"its JSON is damaged ({error})") from error
    except MemoryError as error:
        raise _FaultError("it is larger than the memory") from error
    if not isinstance(content, dict):
        raise _FaultError(f"it holds {_kind(content)}, not an object")
    return content


def _without_outlines(item: dict[str, Any]) -> dict[str, Any]:
    # Most of the file; as objects of Python they would take gigabytes.
    item.pop("segmentation", None)
    return item


def _source(
    content: Mapping[str, Any], folder: Path, class_names: tuple[str, ...]
) -> FileSource:
    categories = _categories(content)
    class_names = _ordered(class_names, categories)
    id_of = {name: number for number, name in categories.items()}
    category_ids = tuple(id_of[name] for name in class_names)
    image_ids, names, sizes = _images(content, folder)
    objects = _Objects(image_ids, category_ids)
    for item, where in _items(content, "annotations"):
        objects.add(item, where)
    order = np.argsort(np.asarray(objects.owners, np.int64), kind="stable")

    def sorted_(values: list[Any]) -> list[Any]:
        return [values[place] for place in order]

    table = AnnotationTable.build(
        sizes,
        np.bincount(np.asarray(objects.owners, np.int64), minlength=len(sizes)),
        sorted_(objects.boxes),
        sorted_(objects.classes),
        crowd=sorted_(objects.crowd),
        areas=sorted_(objects.areas),
    )
    stored = Names(names)
    table, notes = table.checked(stored.__getitem__)
    return FileSource(
        names=stored,
        files=Names(_existing(folder, names)),
        table=table,
        class_names=class_names,
        category_ids=category_ids,
        image_ids=np.array(list(image_ids), np.int64),
        notes=notes,
    )


def _existing(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """The path of each file, or "" if there is none."""
    listed: dict[str, set[str]] = {}  # faster than a call for each file
    for name in names:
        parent, base = os.path.split(os.path.join(folder, name))
        if parent not in listed:
            listed[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        yield os.path.join(parent, base) if base in listed[parent] else ""


def _ordered(
    class_names: tuple[str, ...], categories: Mapping[int, str]
) -> tuple[str, ...]:
    """The names of the classes; ``class_names`` if those are the categories."""
    own = tuple(categories[number] for number in sorted(categories))
    if not class_names:
        return own
    if sorted(class_names) != sorted(own):
        differing = sorted(set(class_names) ^ set(own)) or sorted(class_names)
        raise _FaultError(
            f"its {len(own)} categories are not the {len(class_names)} classes of the "
            f"training split or data.class_names: {differing[0][:50]!r} is in one of "
            "them alone"
        )
    return class_names


def _categories(content: Mapping[str, Any]) -> dict[int, str]:
    """The names of the categories by their ids."""
    categories: dict[int, str] = {}
    for item, where in _items(content, "categories"):
        number, name = _id(item, "id", where), _text(item, "name", where)
        if number in categories or name in categories.values():
            raise _FaultError(f"{where} has the id or the name of an earlier one")
        categories[number] = name
    if not categories:
        raise _FaultError("it has no categories")
    return categories


def _images(
    content: Mapping[str, Any], folder: Path
) -> tuple[dict[int, int], list[str], list[tuple[int, int]]]:
    """The place of each image by its id, the names of files, heights and widths."""
    places: dict[int, int] = {}
    names: dict[str, None] = {}
    sizes = []
    for item, where in _items(content, "images"):
        number, name = _id(item, "id", where), _text(item, "file_name", where)
        if number in places or name in names:
            raise _FaultError(f"{where} has the id or the file_name of an earlier one")
        places[number] = len(places)
        names[name] = None
        height, width = (_side(item, side, where) for side in ("height", "width"))
        sizes.append(
            (height, width) if height and width else size_of_file(str(folder / name))
        )
    if not places:
        raise _FaultError("it has no images")
    return places, list(names), sizes


class _Objects:
    """The objects of all images, in the file's order."""

    def __init__(self, places: Mapping[int, int], category_ids: Sequence[int]):
        self._places = places
        self._class_of = {number: label for label, number in enumerate(category_ids)}
        self._ids: set[int] = set()
        self.owners: list[int] = []
        self.boxes: list[tuple[float, ...]] = []
        self.classes: list[int] = []
        self.crowd: list[bool] = []
        self.areas: list[float] = []

    def add(self, item: Mapping[str, Any], where: str) -> None:
        """Checks and adds an annotation."""
        if "id" in item:
            number = _id(item, "id", where)
            if number in self._ids:
                raise _FaultError(f"{where} has the id {number} of an earlier one")
            self._ids.add(number)
        image = _id(item, "image_id", where)
        category = _id(item, "category_id", where)
        if image not in self._places:
            raise _FaultError(f"{where} has the image_id {image}, which no image has")
        if category not in self._class_of:
            raise _FaultError(
                f"{where} has the category_id {category}, which no category has"
            )
        box = item.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_finite, box)):
            raise _FaultError(
                f"bbox of {where} is {box!r:.50}, not x, y, width, height"
            )
        crowd = item.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise _FaultError(f"iscrowd of {where} is {crowd!r:.50}, not 0 or 1")
        area = item.get("area")
        area = box[2] * box[3] if area is None else area
        if not _finite(area, 2.0**48):
            raise _FaultError(
                f"area of {where} is {area!r:.50}, not a number of pixels"
            )
        self.owners.append(self._places[image])
        self.boxes.append((box[0], box[1], box[0] + box[2], box[1] + box[3]))
        self.classes.append(self._class_of[category])
        self.crowd.append(bool(crowd))
        self.areas.append(area)


def _items(
    content: Mapping[str, Any], name: str
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The objects of a list, each with its name for errors."""
    items = content.get(name)
    if not isinstance(items, list):
        raise _FaultError(f"{name} is {_kind(items)}, not a list")
    for place, item in enumerate(items):
        where = f"{name}[{place}]"
        if not isinstance(item, dict):
            raise _FaultError(f"{where} is {_kind(item)}, not an object")
        yield item, where


def _kind(value: Any) -> str:
    return "missing" if value is None else repr(value)[:50]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any, limit: float = _MOST_PIXELS) -> bool:
    right = isinstance(value, float) or _whole(value)
    return right and abs(value) < limit  # which excludes NaN


def _checked(
    item: Mapping[str, Any], name: str, where: str, right: Callable[[Any], bool]
) -> Any:
    value = item.get(name)
    if not right(value):
        raise _FaultError(f"{name} of {where} is {_kind(value)}")
    return value


def _id(item: Mapping[str, Any], name: str, where: str) -> int:
    return _checked(item, name, where, lambda v: _whole(v) and abs(v) < 2**62)


def _side(item: Mapping[str, Any], name: str, where: str) -> int:
    """A height or width; 0 if the file does not state it."""
    if item.get(name) is None:
        return 0
    return int(
        _checked(
            item, name, where, lambda v: _finite(v) and v >= 0 and v == math.floor(v)
        )
    )


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    def right(value: Any) -> bool:
        if not isinstance(value, str) or not value or "\0" in value:
            return False
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            return False
        return True

    return _checked(item, name, where, right)
