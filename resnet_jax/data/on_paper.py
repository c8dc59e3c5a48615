"""Data sets without their images: their sizes and shapes, for ``plan``."""

import os
from collections.abc import Sequence

import numpy as np

from resnet_jax.config import Config
from resnet_jax.data.dataset import Dataset, open_dataset
from resnet_jax.data.sources import Description, Example, Source
from resnet_jax.data.sources.splits import parse, split_names
from resnet_jax.errors import UserError

_KNOWN: dict[str, tuple[int, tuple[int, int, int] | None, dict[str, int]]] = {
    "imagenet2012": (
        1000,
        None,
        {"train": 1_281_167, "validation": 50_000, "val": 50_000},
    ),
    "cifar10": (10, (32, 32, 3), {"train": 50_000, "test": 10_000}),
    "cifar100": (100, (32, 32, 3), {"train": 50_000, "test": 10_000}),
    "mnist": (10, (28, 28, 1), {"train": 60_000, "test": 10_000}),
    "fashion_mnist": (10, (28, 28, 1), {"train": 60_000, "test": 10_000}),
    "svhn_cropped": (
        10,
        (32, 32, 3),
        {"train": 73_257, "test": 26_032, "extra": 531_131},
    ),
    "digits": (10, (8, 8, 1), {"train": 1_437, "test": 360}),
}
"""Classes, image shape and split sizes, under the names of tfds and of folders."""


def paper_dataset(
    config: Config,
    examples: int | None = None,
    classes: int | None = None,
    image_size: int | None = None,
) -> Dataset:
    """The data set of a config with black images.

    Sizes come from the arguments, from the data in ``data.path``, or from the table of
    known data sets, in this order.

    Args:
      config: of the run.
      examples: in each split that the config names.
      classes: number of classes.
      image_size: side of the stored images.

    Raises:
      UserError: a size is missing.
    """
    name, path = config.data.name.partition(":")[0], config.data.path
    given = any(value is not None for value in (examples, classes, image_size))
    if not given and path is not None and ("://" in path or os.path.exists(path)):
        return open_dataset(config)
    known_classes, shape, sizes = _KNOWN.get(name, (None, None, {}))
    if examples is not None:
        splits = (
            config.data.train_split,
            config.data.test_split,
            config.data.holdout_split,
        )
        names = [base for split in splits if split for base in split_names(split)]
        sizes = dict.fromkeys(names, examples)
    classes = classes or known_classes
    if side := image_size or config.data.image_size:
        shape = (side, side, 3 if shape is None else shape[2])
    if not sizes or classes is None or shape is None:
        missing = {
            "--examples N": sizes,
            "--classes K": classes,
            "--image-size S": shape,
        }
        options = " ".join(option for option, value in missing.items() if not value)
        raise UserError(
            f"the sizes of data set {name!r} are not known here: set data.path to the "
            f"data, or give {options}"
        )
    class_names = tuple(map(str, range(classes)))
    description = Description(name, class_names, shape[2], sizes, shape)
    return open_dataset(config, _Blank(description))


class _Blank:
    """A collection of black images."""

    def __init__(self, description: Description):
        self.description = description

    def source(self, split: str) -> Source:
        """See ``Collection``."""
        parts = parse(split, self.description)
        return _BlankSource(self.description, sum(map(len, parts)))


class _BlankSource:
    """One split of black images."""

    def __init__(self, description: Description, length: int):
        self.class_names: Sequence[str] = description.class_names
        self.channels = description.channels
        self._shape = description.image_shape
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        assert self._shape is not None
        return Example(np.zeros(self._shape, np.uint8), 0, str(index))
