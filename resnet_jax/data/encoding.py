"""Images as ``prepare`` stores them: as they are, or smaller."""

import dataclasses

import cv2
import numpy as np

from resnet_jax.data import images
from resnet_jax.data.sources import Example

_SHRUNK_QUALITY = 95
"""Of images made smaller where no quality is asked for."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What becomes of an image.

    Attributes:
      shorter_side: images whose shorter side is longer are made so small, their aspect
        kept, and encoded as JPEG; None: no image is made smaller.
      quality: all images are encoded as JPEG of it, 1 to 100, but those whose file
        would not be smaller; None: images that keep their size are stored as they were
        found, others with 95.
    """

    shorter_side: int | None = None
    quality: int | None = None

    @property
    def changes(self) -> bool:
        """Whether any image may be encoded anew."""
        return self.shorter_side is not None or self.quality is not None

    def encode(self, example: Example, channels: int) -> bytes:
        """The bytes to store for an example, which decode for certain.

        Raises:
          UserError: the image is broken.
        """
        # All are decoded: what is broken is to be found now, not in training.
        pixels = images.decode(example, channels)
        stored = example.image
        if self.shorter_side is not None and min(pixels.shape[:2]) > self.shorter_side:
            return _jpeg(_shrunk(pixels, self.shorter_side), self.quality)
        if not isinstance(stored, bytes):
            stored = _encoded(".png", pixels, [])
        if self.quality is None:
            return stored
        return min(_jpeg(pixels, self.quality), stored, key=len)


def _jpeg(pixels: np.ndarray, quality: int | None) -> bytes:
    """A JPEG file with colours at half the resolution, which decodes the fastest."""
    options = {
        cv2.IMWRITE_JPEG_QUALITY: quality or _SHRUNK_QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR: cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
        # Codes made for the image: a few percent smaller, and as much faster to read.
        cv2.IMWRITE_JPEG_OPTIMIZE: 1,
    }
    return _encoded(".jpg", pixels, [part for item in options.items() for part in item])


def _shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width, channels = pixels.shape
    scale = side / min(height, width)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    # Each new pixel is the mean of the area it covers: nothing aliases.
    shrunk = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return shrunk.reshape(size[1], size[0], channels)


def _encoded(kind: str, pixels: np.ndarray, options: list[int]) -> bytes:
    colored = pixels.shape[2] == 3
    # OpenCV takes blue first.
    ordered = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if colored else pixels
    _, encoded = cv2.imencode(kind, ordered, options)
    return encoded.tobytes()
