"""Read ImageNet's archives as distributed, without extracting them.

``ILSVRC2012_img_train.tar`` holds a tar of images for each class, and
``ILSVRC2012_img_val.tar`` the validation images. Each image is a run of bytes in the
outer file: one pass indexes them, and then they can be read in any order.
"""

import contextlib
import dataclasses
import functools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from resnet_jax.data.sources import imagenet
from resnet_jax.data.sources.base import (
    Counts,
    Description,
    Example,
    class_labels,
    read_bytes,
)
from resnet_jax.data.sources.folders import (
    Names,
    ending,
    ignored_note,
    is_image_name,
    is_leftover,
)
from resnet_jax.data.sources.label_lists import listed_labels
from resnet_jax.data.sources.splits import Collection
from resnet_jax.errors import UserError
from resnet_jax.storage import open_regular

_DISTRIBUTED = re.compile(r"ILSVRC2012_img_(train|val|test)(_v\d+)?")

# A file in a tar: its name, its first byte in the outer file, and its size.
_Member = tuple[str, int, int]


@dataclasses.dataclass(eq=False)
class TarSource:
    """Images in a tar, or in tars in a tar.

    Attributes:
      path: of the outer tar.
      names: of the images, as in the extracted folder.
      places: int64 (n, 2), first byte in the outer tar and size of each image.
      labels: int32 (n,).
      class_names: in the order of the labels.
      channels: 3; grey images are read as colour.
      notes: on the files that were ignored.
    """

    path: str
    names: Names
    places: np.ndarray
    labels: np.ndarray
    class_names: Sequence[str]
    channels: int = 3
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        start, size = map(int, self.places[index])
        name = f"{self.path}/{self.names[index]}"
        image = read_bytes(self.path, start, size, f"image {name}")
        if len(image) < size:
            raise UserError(f"{self.path} became shorter; image {name} is cut off")
        return Example(image, int(self.labels[index]), name)


def find_tars(path: Path) -> dict[str, Path]:
    """Tars by split at ``path``, which is a tar or a folder with ImageNet's tars."""
    if not path.is_dir():
        match = _DISTRIBUTED.fullmatch(path.stem)
        return {match[1] if match else path.stem: path}
    found = [(_DISTRIBUTED.fullmatch(f.stem), f) for f in sorted(path.glob("*.tar"))]
    return {match[1]: f for match, f in found if match and match[1] != "test"}


def open_tars(tars: Mapping[str, Path]) -> Collection:
    """Splits in tars: a tar with a tar for each class, or images with a list.

    A tar of tars defines the classes; without one they are ImageNet's. The images of a
    split are indexed on demand.
    """
    ignored = {split: Counter[str]() for split in tars}
    members = {
        split: _outer_members(path, ignored[split]) for split, path in tars.items()
    }
    nested = [found for found in members.values() if _is_nested(found)]
    class_names = tuple(map(_class_of, nested[0])) if nested else imagenet.class_ids()

    @functools.cache
    def open_split(split: str) -> TarSource:
        path, outer = tars[split], members[split]
        if not outer:
            raise UserError(
                f"{path} holds no images and no tars of images; expected the content "
                "of ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar"
            )
        if _is_nested(outer):
            return _index_classes(path, outer, class_names, ignored[split])
        files = [name for name, *_ in outer]
        labels = listed_labels(path.parent, split, files, class_names, str(path))
        places = np.array([place for _, *place in outer])
        source = TarSource(str(path), Names(files), places, labels, class_names)
        source.notes = ignored_note(path, ignored[split])
        return source

    description = Description(
        name=", ".join(map(str, tars.values())),
        class_names=class_names,
        channels=3,
        num_examples=Counts(tuple(tars), lambda split: len(open_split(split))),
        kind="tars",
    )
    return Collection(description, open_split)


def _index_classes(
    path: Path,
    outer: list[_Member],
    class_names: Sequence[str],
    ignored: Counter[str],
) -> TarSource:
    labels = class_labels([_class_of(tar) for tar in outer], class_names, path)
    places: list[np.ndarray] = []

    def names() -> Iterator[str]:
        with open_regular(path) as file:
            for tar in outer:
                images = _images(file, tar, path, ignored)
                places.append(np.array([place for _, *place in images]))
                yield from (f"{_class_of(tar)}/{name}" for name, *_ in images)

    with _tar_errors(path):
        found = Names(names())
    labels = np.repeat(labels, list(map(len, places)))
    source = TarSource(str(path), found, np.concatenate(places), labels, class_names)
    source.notes = ignored_note(path, ignored)
    return source


def _is_nested(outer: list[_Member]) -> bool:
    return bool(outer) and outer[0][0].endswith(".tar")


def _class_of(tar: _Member) -> str:
    return tar[0].removesuffix(".tar")


def _outer_members(path: Path, ignored: Counter[str]) -> list[_Member]:
    """The tars in a tar, or else its images, sorted by name; counts what it ignores."""
    with _tar_errors(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        found = sorted(_members(file, 0, size, str(path)))
    tars = [member for member in found if member[0].endswith(".tar")]
    chosen = tars or [member for member in found if is_image_name(member[0])]
    ignored.update(_endings(found) - _endings(chosen))
    return chosen


def _images(
    file: BinaryIO, tar: _Member, path: Path, ignored: Counter[str]
) -> list[_Member]:
    name, start, size = tar
    inner = sorted(_members(file, start, start + size, f"{path}/{name}"))
    images = [member for member in inner if is_image_name(member[0])]
    if not images:
        raise UserError(f"{path}: {name} holds no images; it is damaged")
    ignored.update(_endings(inner) - _endings(images))
    return images


def _endings(members: Sequence[_Member]) -> Counter[str]:
    return Counter(ending(name) for name, *_ in members)


@contextlib.contextmanager
def _tar_errors(path: Path) -> Iterator[None]:
    """Raises UserError for errors of reading a tar."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{path} is not a tar, or it is damaged or compressed: {reason}; give an "
            "uncompressed tar"
        ) from error


def _members(file: BinaryIO, start: int, end: int, name: str) -> Iterator[_Member]:
    """Files of the tar at ``start`` to ``end`` of a file, named without folders."""
    file.seek(start)
    tar = tarfile.TarFile(fileobj=file)
    while (member := tar.next()) is not None:
        if member.size < 0:  # or it would be read again and again
            raise UserError(f"{name} is damaged at byte {member.offset}; copy it again")
        if member.offset_data + member.size > end:
            raise UserError(f"{name} is cut short in {member.name}; copy it again")
        path = PurePosixPath(member.name)
        if member.isfile() and not any(map(is_leftover, path.parts)):
            yield path.name, member.offset_data, member.size
        tar.members = []  # type: ignore[attr-defined] # or it keeps them all
    # tarfile stops at a damaged header too; only a block of zeros is the end.
    file.seek(tar.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise UserError(
            f"{name} is cut short or damaged at byte {tar.offset}; copy it again"
        )
