"""How ``prepare_dataset`` stores images: unchanged, or smaller."""

import dataclasses

import cv2
import numpy as np

from resnet_jax.config.schema import MAX_IMAGE_PIXELS
from resnet_jax.data import images
from resnet_jax.data.sources import Example

_REDUCED_QUALITY = 95  # of reduced images, if no quality is given


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How to store an image.

    Attributes:
      shorter_side: in pixels; images with a longer shorter side are reduced to it and
        stored as JPEG. None reduces no image.
      quality: JPEG quality, 1 to 100, of reduced images, and of all others whose file
        shrinks by it. None gives reduced images 95 and keeps the bytes of the others.
      max_image_pixels: an image whose header states more pixels is broken.
    """

    shorter_side: int | None = None
    quality: int | None = None
    max_image_pixels: int = MAX_IMAGE_PIXELS

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
        pixels = images.decode(example, channels, self.max_image_pixels)
        stored = example.image
        if self.shorter_side is not None and min(pixels.shape[:2]) > self.shorter_side:
            return _jpeg(_reduced(pixels, self.shorter_side), self.quality)
        if not isinstance(stored, bytes):
            stored = _encoded(".png", pixels, [])
        if self.quality is None:
            return stored
        return min(_jpeg(pixels, self.quality), stored, key=len)


def _reduced(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width, channels = pixels.shape
    scale = side / min(height, width)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    # Each new pixel is the mean of the area it covers, which avoids aliasing.
    reduced = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return reduced.reshape(size[1], size[0], channels)


def _jpeg(pixels: np.ndarray, quality: int | None) -> bytes:
    # 4:2:0 colours decode fastest. Huffman codes fitted to the image make the file a
    # few percent smaller and faster to read.
    subsampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420
    options = [cv2.IMWRITE_JPEG_QUALITY, quality or _REDUCED_QUALITY]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, subsampling]
    return _encoded(".jpg", pixels, [*options, cv2.IMWRITE_JPEG_OPTIMIZE, 1])


def _encoded(kind: str, pixels: np.ndarray, options: list[int]) -> bytes:
    if pixels.shape[2] == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)  # OpenCV expects blue first
    return cv2.imencode(kind, pixels, options)[1].tobytes()
