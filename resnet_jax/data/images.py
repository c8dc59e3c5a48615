"""Decode stored bytes to uint8 pixels on the host; convert to Pillow and back."""

import io
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from resnet_jax.data import partial_jpeg
from resnet_jax.data.crops import Window
from resnet_jax.data.sources import Example
from resnet_jax.errors import UserError

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_TRAILER = 4096  # some cameras write a few bytes after a JPEG's end

_LOST_DATA = ("premature end", "bad Huffman code", "found marker", "Unsupported marker")
"""libjpeg's warnings of lost pixels; its other warnings are harmless."""


def decode(example: Example, channels: int) -> np.ndarray:
    """The image of an example as uint8 (h, w, channels); grey or RGB.

    The bytes decide the format, not the file's name. An EXIF rotation is not applied,
    as in other readers, since labels and boxes were made without it. Transparency is
    dropped, and 16 bits are reduced to the upper eight.

    Raises:
      UserError: the image is broken; names its file.
    """
    image = example.image
    if isinstance(image, np.ndarray):
        return image
    if image.startswith(_JPEG_START):
        return _decode_jpeg(image, channels, example.name)
    color = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    flags = color | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), flags) if image else None
    if pixels is None:
        raise _broken(example.name, "it is damaged or not an image")
    return pixels.reshape(*pixels.shape[:2], channels)


def decode_window(
    example: Example, channels: int, choose: Callable[[int, int], Window]
) -> np.ndarray:
    """A window of an example's image: the pixels of ``decode``, but faster.

    ``choose`` returns the window for the image's height and width.

    Raises:
      UserError: the image is broken; names its file. Damage outside the window may go
        unnoticed.
    """
    data = example.image
    decoder = partial_jpeg.decoder()
    if decoder and isinstance(data, bytes) and data.startswith(_JPEG_START):
        _refuse_cut(data, example.name)
        size = decoder.size(data)
        if size is not None:
            window = choose(*size)
            pixels = decoder.window(data, *window, channels)
            if pixels is None:  # decoding the whole image finds the fault
                pixels = window.of(decode(example, channels))
            return pixels
    image = decode(example, channels)
    return choose(*image.shape[:2]).of(image)


def _decode_jpeg(data: bytes, channels: int, name: str) -> np.ndarray:
    _refuse_cut(data, name)
    reason = ""
    try:
        # Pillow converts CMYK as other readers do.
        if simplejpeg.decode_jpeg_header(data)[2] != "CMYK":
            return simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB")
    except ValueError as error:
        reason = str(error)
    if any(sign in reason for sign in _LOST_DATA):
        raise _broken(name, reason)
    # Formats unknown to libjpeg's fast interface, and harmless warnings.
    try:
        with Image.open(io.BytesIO(data)) as opened:
            pixels = np.asarray(opened.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise _broken(name, str(error)) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _refuse_cut(data: bytes, name: str) -> None:
    if _JPEG_END not in data[-_TRAILER:]:
        # libjpeg would silently fill the missing part with grey.
        raise UserError(f"image {name} is cut short; replace or remove it")


def _broken(name: str, reason: str) -> UserError:
    return UserError(f"image {name} cannot be decoded: {reason}; replace or remove it")


def to_pillow(image: np.ndarray) -> Image.Image:
    """A uint8 image (h, w, 1 or 3) as a Pillow image of mode L or RGB.

    Raises:
      UserError: the array has another dtype or number of channels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise UserError(
            f"got an image of {image.dtype} {image.shape}; expected uint8 "
            "(h, w, 1 or 3)"
        )
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def to_array(image: Image.Image) -> np.ndarray:
    """A Pillow image of mode L or RGB as contiguous uint8 (h, w, 1 or 3)."""
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
