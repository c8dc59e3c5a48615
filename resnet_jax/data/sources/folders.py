"""Folders of images: ``root/SPLIT/CLASS/IMAGE``, at the scale of ImageNet."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from resnet_jax.data.sources import imagenet
from resnet_jax.data.sources.base import Description, Example
from resnet_jax.data.sources.label_lists import find_list, has_annotations
from resnet_jax.data.sources.splits import SplitCollection
from resnet_jax.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

_LISTING_THREADS = 8  # network disks are slow, but answer many requests at once


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image's; hidden files do not count."""
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


class Names:
    """Many file names in one bytes object.

    The 1,281,167 names of ImageNet's training images take 48 MB; as Path objects in a
    list they take 390 MB.
    """

    def __init__(self, names: Iterable[str]):
        joined = bytearray()
        lengths = []
        for name in names:
            encoded = os.fsencode(name)
            joined += encoded
            lengths.append(len(encoded))
        self._joined = bytes(joined)
        self._ends = np.cumsum(np.array(lengths, np.int64)).astype(np.uint32)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._joined[start : int(self._ends[index])])

    def checksum(self) -> str:
        """SHA-256 of the names in order."""
        return hashlib.sha256(self._ends.tobytes() + self._joined).hexdigest()


class FolderSource:
    """The images of a folder.

    Attributes:
      class_names: in the order of the labels.
      channels: 3; grey images are read as colour.
      names: of the files, relative to the folder.
      labels: int32 (n,).
    """

    channels = 3

    def __init__(
        self,
        folder: Path,
        names: Names,
        labels: np.ndarray,
        class_names: Sequence[str],
    ):
        self._folder, self.names, self.labels = str(folder), names, labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        file = os.path.join(self._folder, self.names[index])
        try:
            with open(file, "rb") as opened:
                return Example(opened.read(), int(self.labels[index]), file)
        except OSError as error:
            raise UserError(f"image {file} cannot be read: {error.strerror}") from error


class FolderCollection(SplitCollection):
    """``root/SPLIT/CLASS/IMAGE``, and splits with a list of labels.

    Classes are sorted by name, and so are the images of a class, at any depth, as in
    torchvision's ImageFolder. A split is listed when first needed.
    """

    def __init__(self, root: Path, classes_of: str = "train"):
        """Finds the splits of ``root``, and the classes in the split ``classes_of``.

        Raises:
          UserError: ``root`` has no folders.
        """
        self._root = root
        self._sources: dict[str, FolderSource] = {}
        splits = subfolders(root)
        if not splits:
            raise UserError(f"{root} has no folders; expected {root}/train/CLASS/IMAGE")
        self.description = Description(
            name=str(root),
            class_names=tuple(self._class_names(splits, classes_of)),
            channels=FolderSource.channels,
            num_examples=Counts(splits, lambda split: len(self._open(split))),
        )

    def _class_names(self, splits: Sequence[str], classes_of: str) -> Sequence[str]:
        for split in (classes_of, *splits):
            if split in splits and (found := subfolders(self._root / split)):
                return found
        # The validation images alone: their list has ImageNet's classes.
        return imagenet.class_ids()

    def _open(self, split: str) -> FolderSource:
        if split not in self._sources:
            folder = self._root / split
            found = subfolders(folder)
            if found and not has_annotations(self._root, split):
                names, labels = self._list_classes(folder, found)
            else:
                names, labels = self._list_flat(folder, split)
            self._sources[split] = FolderSource(
                folder, names, labels, self.description.class_names
            )
        return self._sources[split]

    def _list_classes(self, folder: Path, found: list[str]) -> tuple[Names, np.ndarray]:
        label_of = {
            name: label for label, name in enumerate(self.description.class_names)
        }
        unknown = [name for name in found if name not in label_of]
        if unknown:
            raise UserError(
                f"{folder} has the class {unknown[0]}, which the training split lacks; "
                "remove it"
            )
        counts: list[int] = []
        names = Names(_names_below(folder, found, counts))
        if not len(names):
            raise UserError(
                f"the class folders of {folder} hold no images ({', '.join(_SUFFIXES)})"
            )
        if 0 in counts:
            raise UserError(
                f"class folder {folder / found[counts.index(0)]} holds no images "
                f"({', '.join(_SUFFIXES)}); add them or remove it"
            )
        labels = np.array([label_of[name] for name in found], np.int32)
        return names, np.repeat(labels, counts)

    def _list_flat(self, folder: Path, split: str) -> tuple[Names, np.ndarray]:
        files = _images_below(folder)
        if not files:
            raise UserError(
                f"{folder} has no class folders; expected {folder}/CLASS/IMAGE.jpg"
            )
        bare = [name.rpartition("/")[2] for name in files]
        labels = find_list(self._root, split, bare, str(folder)).labels(
            bare, self.description.class_names, str(folder)
        )
        return Names(files), labels


class Counts(Mapping[str, int]):
    """Numbers of examples by split, counted on demand."""

    def __init__(self, splits: Sequence[str], count: Callable[[str], int]):
        self._splits, self._count = splits, count

    def __getitem__(self, split: str) -> int:
        if split not in self._splits:
            raise KeyError(split)
        return self._count(split)

    def __contains__(self, split: object) -> bool:
        return split in self._splits

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.is_dir() and not entry.name.startswith(".")
            )
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error.strerror}") from error


def _names_below(folder: Path, classes: list[str], counts: list[int]) -> Iterator[str]:
    """Names of the images of all classes; appends each class's number to ``counts``."""
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        # A few classes at a time, since Python strings take three times the memory.
        for start in range(0, len(classes), 4 * _LISTING_THREADS):
            some = classes[start : start + 4 * _LISTING_THREADS]
            listed = pool.map(lambda name: _images_below(folder / name), some)
            for name, files in zip(some, listed, strict=True):
                counts.append(len(files))
                yield from (f"{name}/{file}" for file in files)


def _images_below(folder: Path) -> list[str]:
    """Images at any depth, relative to ``folder``, sorted by folder and then name."""
    found: dict[str, list[str]] = {}
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        found[inner] = []
        try:
            with os.scandir(folder / inner) as entries:
                for entry in entries:
                    if is_image_name(entry.name) and not entry.is_dir():
                        found[inner].append(entry.name)
                    elif entry.is_dir() and not entry.name.startswith("."):
                        waiting.append(f"{inner}{entry.name}/")
        except OSError as error:
            raise UserError(
                f"folder {folder / inner} cannot be read: {error.strerror}"
            ) from error
    # Without the final slash, "a-b" comes before "a/b", as in torchvision.
    return [
        inner + name
        for inner in sorted(found, key=lambda inner: inner.rstrip("/"))
        for name in sorted(found[inner])
    ]
