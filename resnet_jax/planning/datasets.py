"""Data sets on paper: how many examples there are, of which shape and classes."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from resnet_jax.config.schema import Config
from resnet_jax.data.dataset import Dataset, open_dataset
from resnet_jax.data.sources import Description, Example, Source
from resnet_jax.data.sources.splits import parse, split_names
from resnet_jax.errors import UserError

# Names of splits: those of tfds, and those of folders.
_SIZES: Mapping[str, tuple[int, tuple[int, int, int] | None, dict[str, int]]] = {
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


def paper_dataset(
    config: Config,
    examples: int | None = None,
    classes: int | None = None,
    image_size: int | None = None,
) -> Dataset:
    """The data set of a config without its images.

    What is given comes first, then the data in ``data.path`` if they are at hand, then
    the table of known data sets.

    Args:
      config: of the run.
      examples: of the training split; other splits are then taken to be as large.
      classes: how many there are.
      image_size: side of the stored images, which have three channels.

    Raises:
      UserError: none of these says enough.
    """
    name = config.data.name.partition(":")[0]
    path = config.data.path
    if (examples, classes, image_size) == (None, None, None):
        if path is not None and ("://" in path or os.path.exists(path)):
            return open_dataset(config)
        if name in _SIZES:
            return open_dataset(config, _Blank(_known(config, name)))
        raise UserError(
            f"the size of data set {name!r} is not known without its data: set "
            "data.path to them, or give --examples N, --classes K and --image-size S"
        )
    known = _SIZES.get(name)
    size = image_size or config.data.image_size
    shape = (size, size, 3) if size else known and known[1]
    number = classes or (known and known[0])
    sizes = {} if known is None else dict(known[2])
    if examples is not None:
        splits = [config.data.train_split, config.data.test_split]
        splits += [config.data.holdout_split] if config.data.holdout_split else []
        sizes = {split: examples for part in splits for split in split_names(part)}
    missing = {"--examples": not sizes, "--classes": not number}
    missing["--image-size"] = not shape
    if any(missing.values()):
        names = " and ".join(option for option, lacks in missing.items() if lacks)
        raise UserError(f"data set {name!r} is not a known one: give {names} too")
    return open_dataset(config, _Blank(_description(name, number or 0, shape, sizes)))


def _known(config: Config, name: str) -> Description:
    classes, shape, sizes = _SIZES[name]
    if shape is None and config.data.image_size is None:
        raise UserError(
            f"the images of {name} differ in size: set data.image_size, or give "
            "--image-size"
        )
    return _description(name, classes, shape or (1, 1, 3), sizes)


def _description(
    name: str,
    classes: int,
    shape: tuple[int, int, int] | None,
    sizes: Mapping[str, int],
) -> Description:
    names = tuple(str(index) for index in range(classes))
    channels = shape[2] if shape else 3
    return Description(name, names, channels, dict(sizes), shape)


class _Blank:
    """A collection whose images are black."""

    def __init__(self, description: Description):
        self.description = description

    def source(self, split: str) -> Source:
        """See ``Collection``."""
        parts = parse(split, self.description)
        return _BlankSource(self.description, sum(map(len, parts)))


class _BlankSource:
    """So many black images."""

    def __init__(self, description: Description, length: int):
        self.class_names: Sequence[str] = description.class_names
        self.channels = description.channels
        self._shape = description.image_shape or (1, 1, description.channels)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return Example(np.zeros(self._shape, np.uint8), 0, str(index))
