"""ImageNet's archives as they are distributed, read where they lie.

``ILSVRC2012_img_train.tar`` holds a tar of images for each class, and
``ILSVRC2012_img_val.tar`` the validation images. Tars are not compressed, so each image
is a run of bytes in the outer file: they are indexed once and then read in any order.
"""

import os
import re
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from resnet_jax.data.sources import imagenet
from resnet_jax.data.sources.base import Description, Example
from resnet_jax.data.sources.folders import Counts, Names, is_image_name
from resnet_jax.data.sources.label_lists import find_list
from resnet_jax.data.sources.splits import SplitCollection
from resnet_jax.errors import UserError

_DISTRIBUTED = re.compile(r"ILSVRC2012_img_(train|val|test)(_v\d+)?")

# A file in a tar: its name, and where its bytes start in the outer file, and how many.
_Member = tuple[str, int, int]


class TarSource:
    """Images in a tar, or in tars in a tar.

    Attributes:
      class_names: in the order of the labels.
      channels: 3; grey images are read as colour.
      names: of the images, those of the extracted folder.
      labels: int32 (n,).
    """

    channels = 3

    def __init__(
        self,
        path: Path,
        members: Sequence[_Member],
        labels: np.ndarray,
        class_names: Sequence[str],
    ):
        self._path = str(path)
        self.names = Names(name for name, _, _ in members)
        self._places = np.array([place[1:] for place in members], np.int64)
        self.labels = labels
        self.class_names = class_names
        self._lock, self._file = threading.Lock(), -1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        start, size = (int(value) for value in self._places[index])
        name = f"{self._path}/{self.names[index]}"
        try:
            image = os.pread(self._opened(), size, start)
        except OSError as error:
            raise UserError(f"image {name} cannot be read: {error.strerror}") from error
        if len(image) < size:
            raise UserError(f"{self._path} has become shorter; image {name} is cut off")
        return Example(image, int(self.labels[index]), name)

    def _opened(self) -> int:
        with self._lock:
            if self._file < 0:
                self._file = os.open(self._path, os.O_RDONLY)
            return self._file

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_lock": None, "_file": -1}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)


def find_tars(path: Path) -> dict[str, Path]:
    """Splits to the tars at ``path``: a tar, or a folder with ImageNet's tars."""
    if path.is_dir():
        files = sorted(path.glob("*.tar"))
        found = {match[1]: file for file in files if (match := _match(file))}
        return {split: file for split, file in found.items() if split != "test"}
    match = _match(path)
    return {match[1] if match else path.stem: path}


def _match(path: Path) -> re.Match[str] | None:
    return _DISTRIBUTED.fullmatch(path.stem)


class TarCollection(SplitCollection):
    """Splits in tars: a tar of tars, one for each class, or images with a list."""

    def __init__(self, tars: Mapping[str, Path]):
        """Takes splits to their tars; they are indexed when they are first asked for.

        The classes are those of the tar of tars; where there is none, ImageNet's.
        """
        self._tars = dict(tars)
        self._sources: dict[str, TarSource] = {}
        self._members = {split: _index(path) for split, path in tars.items()}
        nested = [found for found in self._members.values() if isinstance(found, dict)]
        class_names = tuple(sorted(nested[0])) if nested else imagenet.class_ids()
        self.description = Description(
            name=", ".join(map(str, tars.values())),
            class_names=class_names,
            channels=TarSource.channels,
            num_examples=Counts(tuple(tars), lambda split: len(self._open(split))),
        )

    def _open(self, split: str) -> TarSource:
        if split not in self._sources:
            path, found = self._tars[split], self._members.pop(split)
            described = self.description.class_names
            if isinstance(found, dict):
                members, labels = _by_class(path, found, described)
            else:
                members, labels = _by_list(path, split, found, described)
            self._sources[split] = TarSource(path, members, labels, described)
        return self._sources[split]


def _by_class(
    path: Path, found: dict[str, list[_Member]], class_names: Sequence[str]
) -> tuple[list[_Member], np.ndarray]:
    label_of = {name: label for label, name in enumerate(class_names)}
    members: list[_Member] = []
    labels: list[int] = []
    for name in sorted(found):
        if name not in label_of:
            raise UserError(
                f"{path} has the class {name}, which the training split lacks; a net "
                "cannot tell it"
            )
        if not found[name]:
            raise UserError(f"{path}: {name}.tar holds no images; it is damaged")
        members += [(f"{name}/{file}", at, size) for file, at, size in found[name]]
        labels += [label_of[name]] * len(found[name])
    return members, np.array(labels, np.int32)


def _by_list(
    path: Path, split: str, found: list[_Member], class_names: Sequence[str]
) -> tuple[list[_Member], np.ndarray]:
    if not found:
        raise UserError(
            f"{path} holds no images and no tars of images; expected what "
            "ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar holds"
        )
    files = [name for name, _, _ in found]
    listed = find_list(path.parent, split, files, str(path))
    return found, listed.labels(files, class_names, str(path))


def _index(path: Path) -> list[_Member] | dict[str, list[_Member]]:
    """Images in a tar, sorted by name, or, in a tar of tars, those of each class."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            outer = list(_members(file, 0, size, str(path)))
            tars = [member for member in outer if member[0].endswith(".tar")]
            if not tars:
                return sorted(member for member in outer if is_image_name(member[0]))
            classes: dict[str, list[_Member]] = {}
            for name, start, length in tars:
                inner = _members(file, start, start + length, f"{path}/{name}")
                images = sorted(each for each in inner if is_image_name(each[0]))
                classes[name.removesuffix(".tar")] = images
            return classes
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is no tar, or it is damaged or compressed: {error}; give an "
            "uncompressed tar"
        ) from error


def _members(file: BinaryIO, start: int, end: int, name: str) -> Iterator[_Member]:
    """Files of the tar from ``start`` to ``end`` of a file, without their folders."""
    file.seek(start)
    tar = tarfile.TarFile(fileobj=file)
    while (member := tar.next()) is not None:
        if member.offset_data + member.size > end:
            raise UserError(f"{name} is cut short in {member.name}; copy it again")
        if member.isfile():
            yield PurePosixPath(member.name).name, member.offset_data, member.size
        tar.members = []  # type: ignore[attr-defined] # it would keep them all
    # tarfile takes a damaged header for the end: only a block of zeros is that.
    file.seek(tar.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise UserError(
            f"{name} is cut short or damaged at byte {tar.offset}; copy it again"
        )
