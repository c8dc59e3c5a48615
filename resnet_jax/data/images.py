"""Decode stored bytes to uint8 pixels on the host; convert to Pillow and back."""

import contextlib
import io
import re
import struct
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from resnet_jax.config.schema import MAX_IMAGE_PIXELS
from resnet_jax.data import partial_jpeg
from resnet_jax.data.crops import Window
from resnet_jax.data.sources import Example
from resnet_jax.errors import UserError

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
# In compressed data, FF is followed by 0 or by a restart marker.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_PNG_START = b"\x89PNG\r\n\x1a\n"

_PILLOW_FORMATS = ("BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")

_LOST_DATA = ("premature end", "bad Huffman code", "found marker", "Unsupported marker")
"""libjpeg's warnings of lost pixels; its other warnings are harmless."""


def decode(
    example: Example, channels: int, max_pixels: int = MAX_IMAGE_PIXELS
) -> np.ndarray:
    """The image of an example as uint8 (h, w, channels); grey or RGB.

    The bytes decide the format, not the file's name. The rotation in EXIF is not
    applied, as in other readers, since labels and boxes were made without it; Pillow
    applies a TIFF's. Transparency is dropped, and 16 bits are reduced to the upper
    eight. An animation gives its first image.

    Raises:
      UserError: the image is broken, or its header states more than ``max_pixels``;
        names its file.
    """
    image = example.image
    if isinstance(image, np.ndarray):
        return image
    with _faults(example.name):
        if image.startswith(_JPEG_START):
            pixels = _decode_jpeg(image, channels, max_pixels)
        elif image.startswith(_PNG_START):
            pixels = _decode_png(image, channels, max_pixels)
        else:
            pixels = _decode_by_pillow(image, channels, max_pixels, _PILLOW_FORMATS)
        return pixels.reshape(*pixels.shape[:2], channels)


def decode_window(
    example: Example,
    channels: int,
    choose: Callable[[int, int], Window],
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> np.ndarray:
    """A window of an example's image: the pixels of ``decode``, but faster.

    ``choose`` returns the window for the image's height and width.

    Raises:
      UserError: as in ``decode``. Damage outside the window may go unnoticed, unless
        the file is cut short.
    """
    data = example.image
    decoder = partial_jpeg.decoder()
    if decoder and isinstance(data, bytes) and data.startswith(_JPEG_START):
        with _faults(example.name):
            size = decoder.size(data)
            if size is not None:
                _refuse_huge(*size, max_pixels)
                _refuse_cut(data)
                window = choose(*size)
                pixels = decoder.window(data, *window, channels)
                if pixels is None:  # decoding the whole image finds the fault
                    pixels = window.of(decode(example, channels, max_pixels))
                return pixels
    image = decode(example, channels, max_pixels)
    return choose(*image.shape[:2]).of(image)


@contextlib.contextmanager
def _faults(name: str) -> Iterator[None]:
    """Raises UserError for any error of a decoder; each has its own kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(getattr(error, "err", error)) or type(error).__name__
        if not isinstance(error, _BrokenError):
            reason = f"it is damaged ({reason})"
        if isinstance(error, MemoryError):
            reason = "there is too little memory"
        raise UserError(
            f"image {name} cannot be decoded: {' '.join(reason.split())}; replace or "
            "remove it"
        ) from error


def _decode_jpeg(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    _refuse_cut(data)
    reason = ""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _refuse_huge(height, width, max_pixels)
        # Pillow converts CMYK as other readers do.
        if colorspace != "CMYK":
            return simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB")
    except _BrokenError:
        raise
    except ValueError as error:
        reason = str(error)
    if any(sign in reason for sign in _LOST_DATA):
        raise _BrokenError(reason)
    # Formats unknown to libjpeg's fast interface, and harmless warnings.
    return _decode_by_pillow(data, channels, max_pixels, ("JPEG",))


def _decode_png(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    if data[12:16] != b"IHDR":
        raise _BrokenError("it has no header")
    width, height = struct.unpack_from(">II", data, 16)
    _refuse_huge(height, width, max_pixels)
    color = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    flags = color | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(_still_png(data), np.uint8), flags)
    if pixels is None:
        raise _BrokenError("it is damaged")
    return pixels


def _still_png(data: bytes) -> bytes:
    """A PNG without its animation, which OpenCV decodes to black if it is damaged.

    Refuses chunks beyond the end, since OpenCV allocates what they state.
    """
    chunk = struct.Struct(">I4s")
    position, kind = len(_PNG_START), b""
    kept = [_PNG_START]
    while kind != b"IEND" and position + chunk.size <= len(data):
        length, kind = chunk.unpack_from(data, position)
        end = position + chunk.size + length + 4  # and a checksum
        if end - 4 > len(data):
            raise _BrokenError("it is damaged or cut short")
        if kind not in (b"acTL", b"fcTL", b"fdAT"):
            kept.append(data[position:end])
        position = end
    return b"".join(kept) if b"acTL" in data[: data.find(b"IDAT")] else data


def _decode_by_pillow(
    data: bytes, channels: int, max_pixels: int, formats: tuple[str, ...]
) -> np.ndarray:
    """Decodes the formats whose pixels OpenCV changes: by alpha, palette or range."""
    Image.init()
    for name in formats:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory and accept and accept(data[:16]) is True:
            break
    else:
        raise _BrokenError("it is damaged or not an image")
    # Image.open would apply Pillow's global limit of pixels, and not ours.
    with factory(io.BytesIO(data), "") as opened:
        _refuse_huge(opened.height, opened.width, max_pixels)
        return _converted(opened, channels)


def _converted(image: Image.Image, channels: int) -> np.ndarray:
    """A Pillow image of any mode as uint8 (h, w) or (h, w, 3)."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        upper = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return np.asarray(upper.convert(mode))
    if image.mode in ("I", "F"):
        raise _BrokenError("its pixels have 32 bits")
    plain = {"RGBa": "RGBA", "La": "LA"}.get(image.mode)
    return np.asarray((image.convert(plain) if plain else image).convert(mode))


def _refuse_huge(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise _BrokenError(
            f"it states a size of {width} x {height}, beyond the limit "
            f"max_image_pixels={max_pixels}, which you may raise"
        )


def _refuse_cut(data: bytes) -> None:
    """Refuses a JPEG without its end: libjpeg would fill the missing part with grey."""
    if data.endswith(_JPEG_END):
        return
    # Cameras may write more after the end, such as a film: follow the markers.
    position = len(_JPEG_START)
    while marker := _JPEG_MARKER.search(data, position):
        if marker[0] == _JPEG_END:
            return
        length = int.from_bytes(data[marker.end() : marker.end() + 2])
        position = marker.end() + length
    raise _BrokenError("it is cut short")


class _BrokenError(ValueError):
    """A fault that was found here and not by a decoder."""


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


def from_pillow(image: Image.Image, channels: int, name: str) -> np.ndarray:
    """A Pillow image of any mode as uint8 (h, w, channels), as ``decode`` converts it.

    Raises:
      UserError: its file, which Pillow reads only now, is broken; calls it ``name``.
    """
    with _faults(name):
        return _converted(image, channels).reshape(*image.size[::-1], channels)


def to_array(image: Image.Image) -> np.ndarray:
    """A Pillow image of mode L or RGB as contiguous uint8 (h, w, 1 or 3)."""
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
