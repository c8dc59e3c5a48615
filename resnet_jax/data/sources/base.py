"""What a source and a collection of sources are."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """An image as stored and its label.

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

    Sources may be read from many threads at once. They pickle to little more than the
    names of their files, so that they can be sent to worker processes.

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
    """All that is known of a data set before an image is read.

    Attributes:
      name: for reports and error sentences.
      class_names: in the order of the labels.
      channels: 1 for grey images, 3 for colour.
      num_examples: base splits to the numbers of their examples. It may count a split
        only when that is asked for.
      image_shape: (h, w, c), or None where images differ in size or are not known.
      version: of the data set, where it has one.
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
    """The splits of a data set.

    Attributes:
      description: labels, sizes, counts, class names and splits.
    """

    description: Description

    def source(self, split: str) -> Source:
        """A split, or a part of it such as ``train[:90%]`` (see ``splits``).

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
        """See ``take``."""
        return take(self._source, self._indices[indices])


def take(source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Images uint8 (n, h, w, c) and labels (n,) at once, from a source in memory.

    None where the source has to decode them one by one.
    """
    at_once = getattr(source, "take", None)
    return None if at_once is None else at_once(indices)
