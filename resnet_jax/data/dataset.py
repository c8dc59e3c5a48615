"""A data set, opened: its parts, its classes and its pixel statistics."""

import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from resnet_jax.config import Config
from resnet_jax.config.schema import AugmentationConfig, DataConfig
from resnet_jax.data import images, order
from resnet_jax.data.sources import Source, Subset, open_sources
from resnet_jax.data.transforms import MAX_PIXEL, PixelStatistics
from resnet_jax.errors import UserError

_HOLDOUT_KEY = [1, 0]
"""Key of the held-out part: the same examples for every seed of a run."""


class Split:
    """A part of a data set as uint8 images of one shape (h, w, c).

    Attributes:
      name: "train", "holdout" or "test".
      image_shape: (h, w, c).
    """

    def __init__(self, name: str, source: Source, data: DataConfig):
        """Looks at the first image where the config leaves the size open."""
        self.name = name
        self._source, self._data = source, data
        if data.image_size is None:
            first = images.decode(source[0], source.channels)
            self.image_shape: tuple[int, ...] = first.shape
        else:
            self.image_shape = (data.image_size, data.image_size, source.channels)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def nbytes(self) -> int:
        """Size of all its images as uint8."""
        return len(self) * int(np.prod(self.image_shape))

    def example(self, index: int) -> tuple[np.ndarray, int]:
        """Example ``index`` as evaluation sees it: resized and cut in the middle.

        Raises:
          UserError: the image is broken, or of another size where none is set.
        """
        example = self._source[index]
        image = images.decode(example, self._source.channels)
        size = self._data.image_size
        if size is not None:
            side = self._data.eval_shorter_side or size
            image = images.resize_shorter_side(image, side)
            image = images.center_crop(image, size)
        elif image.shape != self.image_shape:
            raise UserError(
                f"image {example.name} is {image.shape[1]}x{image.shape[0]} and the "
                f"first is {self.image_shape[1]}x{self.image_shape[0]}: "
                "set data.image_size"
            )
        return image, example.label

    def random_example(
        self, index: int, rng: np.random.Generator, augmentation: AugmentationConfig
    ) -> tuple[np.ndarray, int]:
        """Example ``index`` cropped at random where the recipe does so on the host."""
        if augmentation.shorter_side is None:
            return self.example(index)
        example = self._source[index]
        image = images.decode(example, self._source.channels)
        size = self.image_shape[0]
        crop = images.scale_and_crop(image, size, augmentation.shorter_side, rng)
        return crop, example.label

    def arrays(self, num_threads: int) -> tuple[np.ndarray, np.ndarray]:
        """All images (n, h, w, c) uint8 and labels (n,) int32."""
        pixels = np.empty((len(self), *self.image_shape), np.uint8)
        labels = np.empty(len(self), np.int32)
        with ThreadPoolExecutor(num_threads) as pool:
            for index, (image, label) in enumerate(
                pool.map(self.example, range(len(self)))
            ):
                pixels[index], labels[index] = image, label
        return pixels, labels

    def statistics_shape(self) -> tuple[int, ...]:
        """Shape of the mean and the deviation of ``statistics``."""
        if self._data.normalization == "per_pixel_mean":
            return self.image_shape
        return (1, 1, self.image_shape[-1])

    def statistics(self) -> PixelStatistics:
        """Mean (and deviation) of the pixels, as ``data.normalization`` says."""
        shape = self.statistics_shape()
        if self._data.normalization == "none":
            return PixelStatistics(np.zeros(shape, np.float32), _ones(shape))
        total, squares, count = self._moments()
        if self._data.normalization == "per_pixel_mean":
            return PixelStatistics((total / count).astype(np.float32), _ones(shape))
        mean = (total / count).mean((0, 1), keepdims=True)
        variance = (squares / count).mean((0, 1), keepdims=True) - mean**2
        # A channel without any variance is left as it is.
        std = np.sqrt(np.where(variance > 0, variance, 1.0))
        return PixelStatistics(mean.astype(np.float32), std.astype(np.float32))

    def _moments(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Sums of the pixels in [0, 1] and of their squares, and over how many."""
        count = min(self._data.statistics_examples or len(self), len(self))
        chosen = order.epoch_order(len(self), seed=0, epoch=0)[:count]
        total = np.zeros(self.image_shape, np.float64)
        squares = np.zeros(self.image_shape, np.float64)
        with ThreadPoolExecutor(self._data.num_threads) as pool:
            for chunk in _chunks(chosen, 512):
                unit = np.stack([image for image, _ in pool.map(self.example, chunk)])
                unit = unit / MAX_PIXEL
                total += unit.sum(0)
                squares += np.square(unit).sum(0)
        return total, squares, count


def _ones(shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape, np.float32)


def _chunks(values: np.ndarray, size: int) -> Iterable[list[int]]:
    for start in range(0, len(values), size):
        yield [int(value) for value in values[start : start + size]]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The parts of a data set.

    Attributes:
      train: what is trained on, the held-out part taken off.
      holdout: the part for choosing, or None.
      test: the part for the reported error alone.
      class_names: in the order of the labels.
    """

    train: Split
    holdout: Split | None
    test: Split
    class_names: Sequence[str]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(h, w, c) of the net's input."""
        return self.train.image_shape


def open_dataset(config: Config) -> Dataset:
    """Opens the data that a config names.

    Raises:
      UserError: data are missing or contradict the config.
    """
    data = config.data
    train, test, chosen_by = open_sources(data)
    holdout = None if chosen_by is None else Split("holdout", chosen_by, data)
    if data.holdout_examples:
        if data.holdout_examples >= len(train):
            raise UserError(
                f"data.holdout_examples={data.holdout_examples} leaves nothing of the "
                f"{len(train)} training examples"
            )
        words = np.random.Philox(key=_HOLDOUT_KEY).random_raw(len(train))
        shuffled = np.argsort(words, kind="stable")
        kept_aside = np.sort(shuffled[: data.holdout_examples])
        rest = np.sort(shuffled[data.holdout_examples :])
        holdout = Split("holdout", Subset(train, kept_aside), data)
        train = Subset(train, rest)
    if config.augmentation.color_noise and train.channels != 3:
        raise UserError("augmentation.color_noise needs colour images; these are grey")
    opened = Dataset(
        train=Split("train", train, data),
        holdout=holdout,
        test=Split("test", test, data),
        class_names=train.class_names,
    )
    if opened.test.image_shape != opened.train.image_shape:
        raise UserError(
            f"the test images are {opened.test.image_shape} and the training images "
            f"{opened.train.image_shape}: set data.image_size"
        )
    return opened
