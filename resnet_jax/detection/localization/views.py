"""The views of test images: the centre or the whole, at several scales."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from resnet_jax.data.views import full_image
from resnet_jax.evaluation.outputs import padded_size


@dataclasses.dataclass(frozen=True)
class View:
    """A test image at one scale, or its centre.

    Attributes:
      index: of the image.
      pixels: uint8 (h, w, channels).
      corner: x, y of the view's corner in the resized image.
      scale: x, y: pixels of the image given for one of the resized image.
    """

    index: int
    pixels: np.ndarray
    corner: tuple[int, int]
    scale: tuple[float, float]

    def placed(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (..., 4) of the view in the image given."""
        return (boxes + np.tile(self.corner, 2)) * np.tile(self.scale, 2)


def view_batches(
    images: Sequence[np.ndarray],
    shorter_sides: Sequence[int],
    crop: int | None,
    batch_size: int,
) -> Iterator[list[View]]:
    """The views of all images, in batches that are padded to one size."""
    waiting: dict[tuple[int, int], list[View]] = collections.defaultdict(list)
    for index in range(len(images)):
        for view in _views(index, images[index], shorter_sides, crop):
            shape = padded_size(*view.pixels.shape[:2])
            waiting[shape].append(view)
            if len(waiting[shape]) == batch_size:
                yield waiting.pop(shape)
    yield from waiting.values()


def _views(
    index: int, image: np.ndarray, shorter_sides: Sequence[int], crop: int | None
) -> Iterator[View]:
    for side in shorter_sides:
        pixels = full_image(image, side)
        height, width = pixels.shape[:2]
        scale = image.shape[1] / width, image.shape[0] / height
        top = left = 0
        if crop is not None:
            top, left = round((height - crop) / 2), round((width - crop) / 2)
            pixels = pixels[top : top + crop, left : left + crop]
        yield View(index, pixels, (left, top), scale)


def padded(pixels: np.ndarray) -> np.ndarray:
    """The view in the top left corner of one of few sizes."""
    height, width = pixels.shape[:2]
    padded = np.zeros((*padded_size(height, width), pixels.shape[2]), np.uint8)
    padded[:height, :width] = pixels
    return padded
