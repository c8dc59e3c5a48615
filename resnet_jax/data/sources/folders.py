"""Folders of images: ``root/SPLIT/CLASS/IMAGE``, at the scale of ImageNet."""

import dataclasses
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from resnet_jax.data.sources import imagenet
from resnet_jax.data.sources.base import (
    Counts,
    Description,
    Example,
    class_labels,
    read_bytes,
)
from resnet_jax.data.sources.label_lists import has_annotations, listed_labels
from resnet_jax.data.sources.splits import Collection
from resnet_jax.errors import UserError

_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".jpe", ".jfif", ".gif", ".pbm", ".pnm"),
)

# Files and folders of systems, file servers and archives; so are hidden ones.
_LEFTOVERS = {
    *("@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx"),
    *("$recycle.bin", "recycler", "system volume information", "lost+found"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}

_LISTING_THREADS = 8  # network disks are slow, but answer many requests at once


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image's."""
    return name.lower().endswith(_SUFFIXES)


def image_suffixes() -> str:
    """The endings of image names, for errors."""
    return ", ".join(_SUFFIXES)


def is_leftover(name: str) -> bool:
    """Whether a file or folder is hidden, or one that systems leave among others."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


def ending(name: str) -> str:
    """The ending of a file name, for reports."""
    return os.path.splitext(name)[1].lower() or "without an ending"


def ignored_note(where: object, ignored: Counter[str]) -> tuple[str, ...]:
    """A sentence on the files that were ignored in a folder or tar, if any were."""
    if not ignored:
        return ()
    kinds = [f"{count} {kind}" for kind, count in ignored.most_common(5)]
    more = ", ..." if len(ignored) > 5 else ""
    files = "1 file" if ignored.total() == 1 else f"{ignored.total()} files"
    return (f"{where}: ignored {files}: {', '.join(kinds)}{more}",)


class Names:
    """Many file names in one bytes object: a tenth of the memory of a list of paths."""

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


@dataclasses.dataclass(eq=False)
class FolderSource:
    """The images of a folder.

    Attributes:
      folder: their folder.
      names: of the files, relative to the folder.
      labels: int32 (n,).
      class_names: in the order of the labels.
      channels: 3; grey images are read as colour.
      notes: on the files that were ignored.
    """

    folder: str
    names: Names
    labels: np.ndarray
    class_names: Sequence[str]
    channels: int = 3
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        file = os.path.join(self.folder, self.names[index])
        image = read_bytes(file, 0, -1, f"image {file}")
        return Example(image, int(self.labels[index]), file)


def open_folders(root: Path, classes_of: str = "train") -> Collection:
    """``root/SPLIT/CLASS/IMAGE``, and splits with a list of labels.

    Classes are sorted by name, and so are the images of a class, at any depth, as in
    torchvision's ImageFolder. The folders of the split ``classes_of`` are the classes.
    A split is listed when first needed.

    Raises:
      UserError: ``root`` has no folders.
    """
    splits = subfolders(root)
    if not splits:
        raise UserError(f"{root} has no folders; expected {root}/train/CLASS/IMAGE")
    candidates = [split for split in (classes_of, *splits) if split in splits]
    classes = (subfolders(root / split) for split in candidates)
    # The validation images alone: their list has ImageNet's classes.
    class_names = tuple(next(filter(None, classes), imagenet.class_ids()))

    @functools.cache
    def open_split(split: str) -> FolderSource:
        folder = root / split
        found, ignored = subfolders(folder), Counter[str]()
        if found and not has_annotations(root, split):
            names, labels = _list_classes(folder, found, class_names, ignored)
        else:
            names, labels = _list_flat(root, split, class_names, ignored)
        notes = ignored_note(folder, ignored)
        return FolderSource(str(folder), names, labels, class_names, notes=notes)

    counts = Counts(splits, lambda split: len(open_split(split)))
    description = Description(str(root), class_names, 3, counts, kind="class folders")
    return Collection(description, open_split)


def _list_classes(
    folder: Path, found: list[str], class_names: Sequence[str], ignored: Counter[str]
) -> tuple[Names, np.ndarray]:
    labels = class_labels(found, class_names, folder)
    counts: list[int] = []
    names = Names(_names_below(folder, found, counts, ignored))
    if 0 in counts:
        empty = folder / found[counts.index(0)]
        raise UserError(
            f"class folder {empty} holds no images ({image_suffixes()}); add them "
            "or remove it"
        )
    with os.scandir(folder) as entries:
        ignored.update(
            f"{ending(entry.name)} beside the class folders"
            for entry in entries
            if not entry.is_dir() and not is_leftover(entry.name)
        )
    return names, np.repeat(labels, counts)


def _list_flat(
    root: Path, split: str, class_names: Sequence[str], ignored: Counter[str]
) -> tuple[Names, np.ndarray]:
    folder = root / split
    files = images_below(folder, ignored)
    if not files:
        raise UserError(
            f"{folder} has no class folders; expected {folder}/CLASS/IMAGE.jpg"
        )
    bare = [name.rpartition("/")[2] for name in files]
    return Names(files), listed_labels(root, split, bare, class_names, str(folder))


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without those that systems leave.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.is_dir() and not is_leftover(entry.name)
            )
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error.strerror}") from error


def _names_below(
    folder: Path, classes: list[str], counts: list[int], ignored: Counter[str]
) -> Iterator[str]:
    """Names of the images of all classes; appends each class's number to ``counts``."""
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        # A few classes at a time, since Python strings take three times the memory.
        for start in range(0, len(classes), 4 * _LISTING_THREADS):
            some = classes[start : start + 4 * _LISTING_THREADS]
            others = [Counter[str]() for _ in some]
            inside = [folder / name for name in some]
            listed = pool.map(images_below, inside, others)
            for name, files, other in zip(some, listed, others, strict=True):
                counts.append(len(files))
                ignored.update(other)
                yield from (f"{name}/{file}" for file in files)


def images_below(
    folder: Path,
    ignored: Counter[str],
    on_fault: Callable[[str], object] | None = None,
) -> list[str]:
    """Images at any depth, relative to ``folder``, sorted by folder and then name.

    Args:
      folder: the folder.
      ignored: counts other files by their ending.
      on_fault: receives a sentence for each folder that cannot be read, which is left
        out; None stops at the first one.

    Raises:
      UserError: a folder cannot be read.
    """
    found: dict[str, list[str]] = {}
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        found[inner] = []
        try:
            with os.scandir(folder / inner) as entries:
                for entry in entries:
                    if is_leftover(entry.name):
                        continue
                    if entry.is_dir():
                        waiting.append(f"{inner}{entry.name}/")
                    elif is_image_name(entry.name):
                        found[inner].append(entry.name)
                    else:
                        ignored[ending(entry.name)] += 1
        except OSError as error:
            sentence = f"folder {folder / inner} cannot be read: {error.strerror}"
            if on_fault is None:
                raise UserError(sentence) from error
            on_fault(sentence)
    # Without the final slash, "a-b" comes before "a/b", as in torchvision.
    return [
        inner + name
        for inner in sorted(found, key=lambda inner: inner.rstrip("/"))
        for name in sorted(found[inner])
    ]
