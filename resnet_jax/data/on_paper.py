"""Data sets without their images: their sizes and shapes, for ``plan``."""

import os

import numpy as np

from resnet_jax.config import Config
from resnet_jax.data.dataset import Dataset, open_dataset
from resnet_jax.data.sources import Collection, Description
from resnet_jax.data.sources.arrays import ArraySource
from resnet_jax.data.sources.splits import split_names
from resnet_jax.errors import UserError

_CIFAR = {"train": 50_000, "test": 10_000}
_MNIST = {"train": 60_000, "test": 10_000}
_SVHN = {"train": 73_257, "test": 26_032, "extra": 531_131}
_IMAGENET = {"train": 1_281_167, "validation": 50_000, "val": 50_000}
_KNOWN: dict[str, tuple[int, tuple[int, int, int] | None, dict[str, int]]] = {
    "imagenet2012": (1000, None, _IMAGENET),
    "cifar10": (10, (32, 32, 3), _CIFAR),
    "cifar100": (100, (32, 32, 3), _CIFAR),
    "mnist": (10, (28, 28, 1), _MNIST),
    "fashion_mnist": (10, (28, 28, 1), _MNIST),
    "svhn_cropped": (10, (32, 32, 3), _SVHN),
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
    sizes_given = (examples, classes, image_size) != (None, None, None)
    if path and not sizes_given and ("://" in path or os.path.exists(path)):
        return open_dataset(config)
    known_classes, shape, sizes = _KNOWN.get(name, (None, None, {}))
    if examples is not None:
        data = config.data
        splits = data.train_split, data.test_split, data.holdout_split
        names = [base for split in splits if split for base in split_names(split)]
        sizes = dict.fromkeys(names, examples)
    classes = classes or known_classes
    if side := image_size or config.data.image_size:
        shape = (side, side, 3 if shape is None else shape[2])
    if not sizes or classes is None or shape is None:
        given = {"--examples N": sizes, "--classes K": classes, "--image-size S": shape}
        options = " ".join(option for option, value in given.items() if not value)
        raise UserError(
            f"the sizes of data set {name!r} are not known here: set data.path to the "
            f"data, or give {options}"
        )
    class_names = tuple(map(str, range(classes)))

    def open_split(split: str) -> ArraySource:
        # Broadcast arrays take no memory.
        images = np.broadcast_to(np.uint8(0), (sizes[split], *shape))
        labels = np.broadcast_to(0, sizes[split])
        return ArraySource(images, labels, class_names, split)

    description = Description(name, class_names, shape[2], sizes, shape)
    return open_dataset(config, Collection(description, open_split))
