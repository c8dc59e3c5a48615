"""Images as ``prepare`` stores them: as they are, or smaller."""

import dataclasses

import cv2
import numpy as np

from resnet_jax.data import images
from resnet_jax.data.sources import Example


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What becomes of an image.

    Attributes:
      shorter_side: images whose shorter side is longer are made so small, their aspect
        kept, and encoded as JPEG; None, and all others, are stored as they were found.
      quality: of that JPEG, 1 to 100.
    """

    shorter_side: int | None = None
    quality: int = 95

    def encode(self, example: Example, channels: int) -> bytes:
        """The bytes to store for an example, which decode for certain.

        Raises:
          UserError: the image is broken.
        """
        # All are decoded: what is broken is to be found now, not in training.
        pixels = images.decode(example, channels)
        shrinks = (
            self.shorter_side is not None and min(pixels.shape[:2]) > self.shorter_side
        )
        if not shrinks:
            stored = example.image
            return stored if isinstance(stored, bytes) else _encoded(".png", pixels, [])
        return _encoded(
            ".jpg",
            _shrunk(pixels, self.shorter_side or 0),
            [cv2.IMWRITE_JPEG_QUALITY, self.quality],
        )


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
