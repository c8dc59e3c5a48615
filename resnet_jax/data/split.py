"""A split of a data set: decoding, cropping and pixel statistics on the host."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from resnet_jax.config.schema import AugmentationConfig, DataConfig
from resnet_jax.data import crops, images, order, policies, views
from resnet_jax.data.sources import Example, Source
from resnet_jax.data.sources.base import notes, take
from resnet_jax.data.transforms import MAX_PIXEL, PixelStatistics
from resnet_jax.errors import UserError

# Mean and standard deviation of ImageNet's channels in [0, 1]; the values of
# fb.resnet.torch, which most models use.
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


class Split:
    """A split of a data set as uint8 images of one shape.

    Attributes:
      name: "train", "holdout" or "test".
      source: the examples as stored.
      image_shape: (h, w, c) of images in evaluation.
      training_shape: (h, w, c) of images in training.
    """

    image_shape: tuple[int, ...]
    training_shape: tuple[int, ...]

    def __init__(self, name: str, source: Source, data: DataConfig):
        """Reads the first image if the config does not set the size."""
        self.name, self.source, self._data = name, source, data
        self._kept: tuple[np.ndarray, np.ndarray] | None = None
        if data.image_size is None:
            self.image_shape = self._decoded(source[0]).shape
            self.training_shape = self.image_shape
        else:
            size = data.eval_image_size or data.image_size
            self.image_shape = size, size, source.channels
            self.training_shape = data.image_size, data.image_size, source.channels

    def __len__(self) -> int:
        return len(self.source)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the data for the start of a run."""
        return notes(self.source)

    @property
    def nbytes(self) -> int:
        """Bytes of all images as uint8."""
        return len(self) * int(np.prod(self.image_shape))

    def example(self, index: int) -> tuple[np.ndarray, int]:
        """Image and label of an example for evaluation: resized and centre-cropped.

        Raises:
          UserError: the image is broken, or sizes differ and data.image_size is None.
        """
        if self._kept is not None:
            return self._kept[0][index], int(self._kept[1][index])
        example = self.source[index]
        image = self._decoded(example)
        data, size = self._data, self.image_shape[0]
        if data.image_size is not None:
            side = data.eval_shorter_side or size
            views.refuse_narrow(image, side, example.name, data.max_image_pixels)
            image = views.center_crop(image, side, size, data.eval_interpolation)
        elif image.shape != self.image_shape:
            raise UserError(
                f"image {example.name} is {image.shape[1]}x{image.shape[0]} and the "
                f"first is {self.image_shape[1]}x{self.image_shape[0]}: "
                "set data.image_size"
            )
        return image, example.label

    def _decoded(self, example: Example) -> np.ndarray:
        limit = self._data.max_image_pixels
        return images.decode(example, self.source.channels, limit)

    def training_example(
        self,
        index: int,
        rng: np.random.Generator,
        augmentation: AugmentationConfig,
        out: np.ndarray,
    ) -> int:
        """Writes an example for training into ``out``, and returns its label.

        ``out`` is contiguous uint8 ``training_shape``. The random crop, flip and policy
        are applied if they run on the host.

        Raises:
          UserError: the image is broken.
        """
        if augmentation.shorter_side is None and augmentation.crop_area is None:
            out[...], label = self.example(index)
        else:
            example = self.source[index]

            def choose(height: int, width: int) -> crops.Window:
                if sides := augmentation.shorter_side:
                    return crops.scale_window(height, width, out.shape[0], sides, rng)
                area = augmentation.crop_area or (1.0, 1.0)
                aspect = augmentation.crop_aspect
                return crops.inception_window(height, width, area, aspect, rng)

            window = images.decode_window(
                example, self.source.channels, choose, self._data.max_image_pixels
            )
            crops.resize(window, out)
            label = example.label
        if augmentation.on_host and augmentation.flip and rng.random() < 0.5:
            crops.mirror(out)
        if augmentation.policy is not None:
            out[...] = policies.apply_policy(out, rng, augmentation)
        return label

    @property
    def in_memory(self) -> bool:
        """Whether ``take`` returns examples."""
        return self.take(np.zeros(0, np.int64)) is not None

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Examples as ``example`` returns them, from arrays in memory; else None."""
        return None if self._data.image_size else take(self.source, indices)

    def arrays(self, num_threads: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """All images uint8 (n, h, w, c), labels int32 (n,) and the errors.

        With ``data.on_error="skip"``, a broken image has label -1, and the list holds a
        sentence for each.

        Raises:
          UserError: an image is broken and ``data.on_error`` is "stop".
        """
        if self._kept is not None:
            return *self._kept, []
        pixels = np.zeros((len(self), *self.image_shape), np.uint8)
        labels = np.empty(len(self), np.int32)

        def fill(index: int) -> str | None:
            found = self._example_or_fault(index)
            if isinstance(found, str):
                labels[index] = -1
                return found
            pixels[index], labels[index] = found
            return None

        with ThreadPoolExecutor(num_threads) as pool:
            faults = list(pool.map(fill, range(len(self))))
        return pixels, labels, [fault for fault in faults if fault]

    def keep(self, num_threads: int) -> None:
        """Decodes all images and keeps them, for several runs on the same data.

        Keeps nothing if images are broken, because each run must report them.
        """
        pixels, labels, faults = self.arrays(num_threads)
        if not faults:
            pixels.flags.writeable = labels.flags.writeable = False
            self._kept = pixels, labels

    def statistics(self) -> PixelStatistics:
        """Mean and deviation of the pixels for ``data.normalization``."""
        kind = self._data.normalization
        per_pixel = kind == "per_pixel_mean"
        shape = self.image_shape if per_pixel else (1, 1, self.image_shape[-1])
        ones = np.ones(shape, np.float32)
        if kind == "none":
            return PixelStatistics(np.zeros(shape, np.float32), ones)
        if kind == "imagenet":
            return PixelStatistics(
                IMAGENET_MEAN.reshape(shape), IMAGENET_STD.reshape(shape)
            )
        total, squares, count = self._moments()
        if per_pixel:
            return PixelStatistics((total / count).astype(np.float32), ones)
        mean = (total / count).mean((0, 1), keepdims=True)
        variance = (squares / count).mean((0, 1), keepdims=True) - mean**2
        # A constant channel is not scaled.
        std = np.sqrt(np.where(variance > 0, variance, 1.0))
        return PixelStatistics(mean.astype(np.float32), std.astype(np.float32))

    def _moments(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Sums of pixels in [0, 1] and of their squares, and the number of images."""
        count = min(self._data.statistics_examples or len(self), len(self))
        chosen = order.epoch_order(len(self), seed=0, epoch=0)[:count].tolist()
        total = np.zeros(self.image_shape, np.float64)
        squares = np.zeros(self.image_shape, np.float64)
        whole = 0
        with ThreadPoolExecutor(self._data.threads) as pool:
            for start in range(0, count, 512):
                found = pool.map(self._example_or_fault, chosen[start : start + 512])
                pixels = [each[0] for each in found if not isinstance(each, str)]
                if pixels:
                    unit = np.stack(pixels) / MAX_PIXEL
                    total += unit.sum(0)
                    squares += np.square(unit).sum(0)
                    whole += len(pixels)
        if not whole:
            raise UserError(f"no image of the {self.name} split can be decoded")
        return total, squares, whole

    def _example_or_fault(self, index: int) -> tuple[np.ndarray, int] | str:
        """``example``, or its error if ``data.on_error`` is "skip"."""
        try:
            return self.example(index)
        except UserError as error:
            if self._data.on_error == "stop":
                raise
            return str(error)
