"""What every source shares: examples, descriptions, subsets."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from resnet_jax.errors import UserError
from resnet_jax.storage import open_regular


@dataclasses.dataclass(frozen=True)
class Example:
    """An image as stored, and its label.

    Attributes:
      image: an encoded file's bytes, or a uint8 array (h, w, c).
      label: index of the class.
      name: file or index, for errors.
    """

    image: bytes | np.ndarray
    label: int
    name: str


class Source(Protocol):
    """Labelled images by index.

    Many threads may read a source at once. A source pickles to little more than the
    names of its files, so that worker processes can receive it.

    Attributes:
      class_names: in the order of the labels.
      channels: 1 for grey images, 3 for colour.
    """

    class_names: Sequence[str]
    channels: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Example ``index``, 0 <= index < len(self)."""


@dataclasses.dataclass(frozen=True)
class Description:
    """A data set's facts, known before an image is read.

    Attributes:
      name: for reports and errors.
      class_names: in the order of the labels.
      channels: 1 for grey images, 3 for colour.
      num_examples: number of examples by base split; may count a split on demand.
      image_shape: (h, w, c); None if sizes differ or are unknown.
      version: of the data set, if it has one.
      kind: how it is stored, such as "class folders".
      checksum: of a prepared data set's shards.
    """

    name: str
    class_names: tuple[str, ...]
    channels: int
    num_examples: Mapping[str, int]
    image_shape: tuple[int, int, int] | None = None
    version: str | None = None
    kind: str = "arrays"
    checksum: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the base splits."""
        return tuple(self.num_examples)


class Counts(Mapping[str, int]):
    """Numbers of examples by split, counted on demand."""

    def __init__(self, splits: Sequence[str], count: Callable[[str], int]):
        self._splits, self._count = splits, count

    def __getitem__(self, split: str) -> int:
        return self._count(split)

    def __contains__(self, split: object) -> bool:
        return split in self._splits

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)


class Subset:
    """The examples of a source at the given indices."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices
        self.class_names, self.channels = source.class_names, source.channels
        self.notes = notes(source)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """See the function ``take``."""
        return take(self._source, self._indices[indices])


class Relabelled:
    """A source with its classes in another order."""

    def __init__(self, source: Source, class_names: Sequence[str]):
        """``class_names`` are the source's, in the order of the new labels."""
        self.notes = notes(source)
        self._source, self.channels = source, source.channels
        self.class_names = class_names
        self._labels = class_labels(source.class_names, class_names, source)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        return dataclasses.replace(example, label=int(self._labels[example.label]))

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """See the function ``take``."""
        taken = take(self._source, indices)
        return None if taken is None else (taken[0], self._labels[taken[1]])


def take(source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Images uint8 (n, h, w, c) and labels (n,) of a source in memory.

    None if the source decodes its images one by one.
    """
    at_once = getattr(source, "take", None)
    return None if at_once is None else at_once(indices)


def notes(source: Source) -> tuple[str, ...]:
    """Sentences for the start of a run, such as on files that a source ignored."""
    return getattr(source, "notes", ())


def class_labels(
    found: Sequence[str], class_names: Sequence[str], where: object
) -> np.ndarray:
    """The labels of the classes in a folder or archive ``where``, int32.

    Raises:
      UserError: a class is not in ``class_names``.
    """
    label_of = {name: label for label, name in enumerate(class_names)}
    for name in found:
        if name not in label_of:
            raise UserError(
                f"{where} has the class {name}, which the training split lacks; remove "
                "it"
            )
    return np.array([label_of[name] for name in found], np.int32)


def check_label(label: int, num_classes: int, name: str) -> int:
    """The label of the example ``name``.

    Raises:
      UserError: it is not the label of a class.
    """
    if not 0 <= label < num_classes:
        raise UserError(
            f"{name} has the label {label}, but the {num_classes} classes have the "
            f"labels 0 to {num_classes - 1}: it is unlabelled or damaged"
        )
    return label


def read_bytes(path: str, start: int, size: int, name: str) -> bytes:
    """Up to ``size`` bytes of a file; -1 means all from ``start`` on.

    Raises:
      UserError: the file cannot be read; calls it ``name``.
    """
    try:
        with open_regular(path) as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise UserError(f"{name} is larger than the memory") from error


def refuse_special(path: str | os.PathLike[str]) -> None:
    """Raises UserError for devices and pipes, which libraries would wait for."""
    given = os.fspath(path)
    if "://" not in given and os.path.exists(given) and not os.path.isfile(given):
        raise UserError(f"{given} is not a regular file; replace it")


def read_text(path: Path) -> str:
    """The text of a file, in UTF-8 and without a byte-order mark.

    Raises:
      UserError: it cannot be read, or is not text.
    """
    try:
        return read_bytes(str(path), 0, -1, str(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text in UTF-8: {error}") from error
