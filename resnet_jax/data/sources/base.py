"""The interfaces of a source and of a collection of sources."""

import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """An image as stored, and its label.

    Attributes:
      image: an encoded file's bytes, or a uint8 array (h, w, c).
      label: index of the class.
      name: file or index, for error sentences.
    """

    image: bytes | np.ndarray
    label: int
    name: str


class Source(Protocol):
    """Labelled images by index.

    Many threads may read a source at once. A source pickles to little more than the
    names of its files, so that worker processes can receive it.

    Attributes:
      class_names: the classes' names in the order of the labels.
      channels: 1 for grey images, 3 for colour.
    """

    class_names: Sequence[str]
    channels: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Example ``index``, 0 <= index < len(self)."""
        ...


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
    """

    name: str
    class_names: tuple[str, ...]
    channels: int
    num_examples: Mapping[str, int]
    image_shape: tuple[int, int, int] | None = None
    version: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the base splits."""
        return tuple(self.num_examples)


class Collection(Protocol):
    """The splits of a data set, and its description."""

    description: Description

    def source(self, split: str) -> Source:
        """A split, or a part such as ``train[:90%]`` (see ``splits``).

        Raises:
          UserError: there is no such split or part, or it cannot be read.
        """
        ...


class Subset:
    """The examples of a source at the given indices."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices
        self.class_names, self.channels = source.class_names, source.channels

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """See the function ``take``."""
        return take(self._source, self._indices[indices])


def take(source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Images uint8 (n, h, w, c) and labels (n,) of a source in memory.

    None if the source decodes its images one by one.
    """
    at_once = getattr(source, "take", None)
    return None if at_once is None else at_once(indices)


class FileReader:
    """Reads parts of files from many threads; opens a file when first needed.

    It can be pickled: the copy opens the files again.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = list(paths)
        self._lock, self._opened = threading.Lock(), dict[int, int]()

    def read(self, number: int, start: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``start`` of file ``number``; may raise OSError."""
        with self._lock:
            if number not in self._opened:
                self._opened[number] = os.open(self.paths[number], os.O_RDONLY)
        return os.pread(self._opened[number], size, start)

    def __reduce__(self) -> tuple[Any, ...]:
        return FileReader, (self.paths,)

    def __del__(self) -> None:
        for file in getattr(self, "_opened", {}).values():
            os.close(file)
