"""Decoding, resizing and cropping on the host: uint8 in, uint8 out."""

import cv2
import numpy as np

from resnet_jax.data.sources import Example
from resnet_jax.errors import UserError

# Threads are the feed's: OpenCV's own would compete with them.
cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_TRAILER = 4096  # some cameras write a little after a JPEG's end


def decode(example: Example, channels: int) -> np.ndarray:
    """The image of an example as uint8 (h, w, channels); grey or RGB.

    The pixels are taken as stored: a rotation in EXIF is not applied, as in the
    field's other readers, since labels and boxes were made without it.

    Raises:
      UserError: it is broken, named by its file.
    """
    image = example.image
    if isinstance(image, np.ndarray):
        return image
    if image.startswith(_JPEG_START) and _JPEG_END not in image[-_TRAILER:]:
        # OpenCV would fill the missing part with grey and say nothing.
        raise UserError(f"image {example.name} is cut short; replace or remove it")
    color = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    pixels = None
    if image:
        flags = color | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), flags)
    if pixels is None:
        raise UserError(
            f"image {example.name} cannot be decoded: it is damaged or not an image; "
            "replace or remove it"
        )
    return pixels.reshape(*pixels.shape[:2], channels)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resized; averaging over areas when shrinking, so that nothing aliases."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height < image.shape[0]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(image, (width, height), interpolation=method)
    return resized.reshape(height, width, image.shape[2])


def resize_shorter_side(image: np.ndarray, side: int) -> np.ndarray:
    """Resized to a shorter side of ``side``, its aspect kept."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    # Rounding must not make the shorter side differ from what was asked for.
    return _resize(
        image, max(side, round(height * scale)), max(side, round(width * scale))
    )


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The middle ``size`` x ``size`` pixels; the extra pixel goes right and below."""
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def scale_and_crop(
    image: np.ndarray, size: int, sides: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """The paper's scale augmentation (section 3.4).

    The shorter side is drawn uniformly from the integers ``sides[0] .. sides[1]``,
    then a ``size`` x ``size`` window from all its places.
    """
    image = resize_shorter_side(
        image, int(rng.integers(sides[0], sides[1], endpoint=True))
    )
    top = int(rng.integers(image.shape[0] - size, endpoint=True))
    left = int(rng.integers(image.shape[1] - size, endpoint=True))
    return image[top : top + size, left : left + size]
