"""Read ImageNet's archives as distributed, without extracting them.

``ILSVRC2012_img_train.tar`` holds a tar of images for each class, and
``ILSVRC2012_img_val.tar`` the validation images. Tars are not compressed, so each image
is a run of bytes in the outer file: one pass indexes them, and then they can be read in
any order.
"""

import array
import contextlib
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from resnet_jax.data.sources import imagenet
from resnet_jax.data.sources.base import Description, Example, FileReader
from resnet_jax.data.sources.folders import Counts, Names, is_image_name
from resnet_jax.data.sources.label_lists import find_list
from resnet_jax.data.sources.splits import SplitCollection
from resnet_jax.errors import UserError

_DISTRIBUTED = re.compile(r"ILSVRC2012_img_(train|val|test)(_v\d+)?")

# A file in a tar: its name, its first byte in the outer file, and its size.
_Member = tuple[str, int, int]


class TarSource:
    """Images in a tar, or in tars in a tar.

    Attributes:
      class_names: in the order of the labels.
      channels: 3; grey images are read as colour.
      names: of the images, as in the extracted folder.
      labels: int32 (n,).
    """

    channels = 3

    def __init__(
        self,
        path: Path,
        members: Iterable[_Member],
        labels: Callable[[Names], np.ndarray],
        class_names: Sequence[str],
    ):
        """Indexes ``members``; ``labels`` gives the labels of all names."""
        starts, sizes = array.array("q"), array.array("q")

        def names() -> Iterator[str]:
            for name, start, size in members:
                starts.append(start)
                sizes.append(size)
                yield name

        self._path = str(path)
        self.names = Names(names())
        self._starts, self._sizes = np.array(starts), np.array(sizes)
        self.labels = labels(self.names)
        self.class_names = class_names
        self._file = FileReader([self._path])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        start, size = int(self._starts[index]), int(self._sizes[index])
        name = f"{self._path}/{self.names[index]}"
        try:
            image = self._file.read(0, start, size)
        except OSError as error:
            raise UserError(f"image {name} cannot be read: {error.strerror}") from error
        if len(image) < size:
            raise UserError(f"{self._path} became shorter; image {name} is cut off")
        return Example(image, int(self.labels[index]), name)


def find_tars(path: Path) -> dict[str, Path]:
    """Tars by split at ``path``, which is a tar or a folder with ImageNet's tars."""
    if path.is_dir():
        files = sorted(path.glob("*.tar"))
        found = {match[1]: file for file in files if (match := _match(file))}
        return {split: file for split, file in found.items() if split != "test"}
    match = _match(path)
    return {match[1] if match else path.stem: path}


def _match(path: Path) -> re.Match[str] | None:
    return _DISTRIBUTED.fullmatch(path.stem)


class TarCollection(SplitCollection):
    """Splits in tars: a tar with a tar for each class, or images with a list."""

    def __init__(self, tars: Mapping[str, Path]):
        """Opens tars by split; indexes the images of a split on demand.

        A tar of tars defines the classes; without one they are ImageNet's.
        """
        self._tars = dict(tars)
        self._sources: dict[str, TarSource] = {}
        self._outer = {split: _outer_members(path) for split, path in tars.items()}
        nested = [found for found in self._outer.values() if _is_nested(found)]
        class_names = [_class_of(member) for member in nested[0]] if nested else None
        self.description = Description(
            name=", ".join(map(str, tars.values())),
            class_names=tuple(class_names or imagenet.class_ids()),
            channels=TarSource.channels,
            num_examples=Counts(tuple(tars), lambda split: len(self._open(split))),
        )

    def _open(self, split: str) -> TarSource:
        if split not in self._sources:
            path, outer = self._tars[split], self._outer[split]
            read = self._by_class if _is_nested(outer) else self._by_list
            with _tar_errors(path):
                self._sources[split] = read(path, split, outer)
        return self._sources[split]

    def _by_class(self, path: Path, split: str, outer: list[_Member]) -> TarSource:
        class_names = self.description.class_names
        label_of = {name: label for label, name in enumerate(class_names)}
        labels = array.array("i")

        def members() -> Iterator[_Member]:
            with open(path, "rb") as file:
                for tar in outer:
                    name, images = _class_of(tar), _images(file, tar, path)
                    if name not in label_of:
                        raise UserError(
                            f"{path} has the class {name}, which the training split "
                            "lacks; remove it"
                        )
                    labels.extend([label_of[name]] * len(images))
                    yield from (
                        (f"{name}/{each}", at, size) for each, at, size in images
                    )

        return TarSource(
            path, members(), lambda _: np.array(labels, np.int32), class_names
        )

    def _by_list(self, path: Path, split: str, outer: list[_Member]) -> TarSource:
        class_names = self.description.class_names
        if not outer:
            raise UserError(
                f"{path} holds no images and no tars of images; expected the content "
                "of ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar"
            )

        def labels(names: Names) -> np.ndarray:
            files = [names[i] for i in range(len(names))]
            listed = find_list(path.parent, split, files, str(path))
            return listed.labels(files, class_names, str(path))

        return TarSource(path, outer, labels, class_names)


def _is_nested(outer: list[_Member]) -> bool:
    return bool(outer) and outer[0][0].endswith(".tar")


def _class_of(tar: _Member) -> str:
    return tar[0].removesuffix(".tar")


def _outer_members(path: Path) -> list[_Member]:
    """The tars in a tar, or else its images, sorted by name."""
    with _tar_errors(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        found = sorted(_members(file, 0, size, str(path)))
    tars = [member for member in found if member[0].endswith(".tar")]
    return tars or [member for member in found if is_image_name(member[0])]


def _images(file: BinaryIO, tar: _Member, path: Path) -> list[_Member]:
    name, start, size = tar
    inner = _members(file, start, start + size, f"{path}/{name}")
    images = sorted(member for member in inner if is_image_name(member[0]))
    if not images:
        raise UserError(f"{path}: {name} holds no images; it is damaged")
    return images


@contextlib.contextmanager
def _tar_errors(path: Path) -> Iterator[None]:
    """Raises UserError for errors of reading a tar."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is not a tar, or it is damaged or compressed: {error}; give an "
            "uncompressed tar"
        ) from error


def _members(file: BinaryIO, start: int, end: int, name: str) -> Iterator[_Member]:
    """Files of the tar at ``start`` to ``end`` of a file, named without folders."""
    file.seek(start)
    tar = tarfile.TarFile(fileobj=file)
    while (member := tar.next()) is not None:
        if member.offset_data + member.size > end:
            raise UserError(f"{name} is cut short in {member.name}; copy it again")
        if member.isfile():
            yield PurePosixPath(member.name).name, member.offset_data, member.size
        tar.members = []  # type: ignore[attr-defined] # or it keeps them all
    # tarfile stops at a damaged header too; only a block of zeros is the end.
    file.seek(tar.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise UserError(
            f"{name} is cut short or damaged at byte {tar.offset}; copy it again"
        )
