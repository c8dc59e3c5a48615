"""How ``prepare_dataset`` stores images: unchanged, or smaller."""

import dataclasses

import cv2
import numpy as np

from resnet_jax.data import images
from resnet_jax.data.sources import Example

_SHRUNK_QUALITY = 95  # of images made smaller, if no quality is given


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How to store an image.

    Attributes:
      shorter_side: images with a longer shorter side are reduced to it, with their
        aspect kept, and encoded as JPEG; None means that no image is reduced.
      quality: JPEG quality, 1 to 100, of all images whose file shrinks by it; None
        means that images keep their bytes, and reduced ones get 95.
    """

    shorter_side: int | None = None
    quality: int | None = None

    @property
    def changes(self) -> bool:
        """Whether any image may be encoded again."""
        return self.shorter_side is not None or self.quality is not None

    def encode(self, example: Example, channels: int) -> bytes:
        """The bytes to store for an example; they are known to decode.

        Raises:
          UserError: the image is broken.
        """
        # Every image is decoded, to find broken ones now and not in training.
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
    """A JPEG file with 4:2:0 colours, which decodes fastest."""
    options = {
        cv2.IMWRITE_JPEG_QUALITY: quality or _SHRUNK_QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR: cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
        # Huffman codes fitted to the image: a few percent smaller and faster to read.
        cv2.IMWRITE_JPEG_OPTIMIZE: 1,
    }
    return _encoded(".jpg", pixels, [part for item in options.items() for part in item])


def _shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width, channels = pixels.shape
    scale = side / min(height, width)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    # Each new pixel is the mean of the area it covers, which avoids aliasing.
    shrunk = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return shrunk.reshape(size[1], size[0], channels)


def _encoded(kind: str, pixels: np.ndarray, options: list[int]) -> bytes:
    colored = pixels.shape[2] == 3
    # OpenCV expects blue first.
    ordered = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if colored else pixels
    _, encoded = cv2.imencode(kind, ordered, options)
    return encoded.tobytes()
