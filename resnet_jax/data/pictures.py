"""A user's own pictures, without labels: files, Pillow images and arrays.

Unlike the readers of data sets, these turn a picture upright as its EXIF says.
"""

import io
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from resnet_jax.config.schema import MAX_IMAGE_PIXELS
from resnet_jax.data import images, views
from resnet_jax.data.sources import Example
from resnet_jax.data.sources.base import read_bytes
from resnet_jax.errors import UserError

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
"""A file's path, a Pillow image of any mode, or uint8 pixels: (h, w), or (h, w, c) with
1, 3 or 4 channels, the fourth being the opacity, which is ignored."""

_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 3),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}
"""What turns pixels upright, by the orientation in EXIF; 1 is upright."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by channels


def is_picture(value: Any) -> bool:
    """Whether a value is one picture and not a sequence of them."""
    single = str | os.PathLike | Image.Image
    return isinstance(value, single) or (hasattr(value, "__array__") and value.ndim < 4)


def read_picture(picture: Picture, channels: int, name: str) -> np.ndarray:
    """The pixels of a picture, upright: contiguous uint8 (h, w, channels).

    Colours become grey for 1 channel, and grey pictures get three equal channels for 3.
    Otherwise pixels are as ``data.images.decode`` returns them.

    Args:
      picture: see ``Picture``.
      channels: 1 or 3.
      name: of the picture, for errors.

    Raises:
      UserError: the picture is broken, or it is not one of the kinds of ``Picture``.
    """
    if isinstance(picture, str | os.PathLike):
        data = read_bytes(os.fspath(picture), 0, -1, f"image {name}")
        pixels = images.decode(Example(data, -1, name), channels)
        pixels = _UPRIGHT.get(_orientation(data), np.asarray)(pixels)
    elif isinstance(picture, Image.Image):
        if 0 in picture.size:
            raise UserError(f"{name} has no pixels")
        pixels = images.from_pillow(picture, channels, name)  # Loading may turn it.
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
        pixels = _UPRIGHT.get(orientation, np.asarray)(pixels)
    else:
        pixels = images.from_pillow(_of_array(picture, name), channels, name)
    return np.ascontiguousarray(pixels)


def _orientation(data: bytes) -> int:
    """The orientation in the EXIF of an encoded image, if decoding ignores it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "TIFF":  # Pillow turns it upright when it loads it.
                return 1
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Damaged EXIF does no harm; decoding found the image whole.
        return 1


def _of_array(picture: Any, name: str) -> Image.Image:
    if not hasattr(picture, "__array__"):
        raise UserError(
            f"{name} is {type(picture).__name__}: give a path, a Pillow image or an "
            "array of uint8"
        )
    pixels = np.asarray(picture)
    if pixels.dtype != np.uint8:
        raise UserError(
            f"{name} is an array of {pixels.dtype}: give uint8 pixels from 0 to 255"
        )
    shape = pixels.shape if pixels.ndim == 3 else (*pixels.shape, 1)
    if len(shape) != 3 or shape[2] not in _MODES or 0 in shape:
        raise UserError(
            f"{name} is an array of the shape {pixels.shape}: give (h, w), or (h, w, "
            "c) with 1, 3 or 4 channels"
        )
    pixels = np.ascontiguousarray(pixels.reshape(shape))
    return Image.fromarray(pixels[..., 0] if shape[2] == 1 else pixels)


class Pictures:
    """A source of pictures, decoded and upright; all have the label -1.

    Attributes:
      broken: indices of the pictures that could not be read until now.
    """

    class_names: Sequence[str] = ()

    def __init__(
        self,
        pictures: Sequence[Picture],
        channels: int,
        shorter_sides: Sequence[int] = (),
        start: int = 0,
    ):
        """Reads nothing yet.

        Args:
          pictures: see ``Picture``.
          channels: to which their colours are converted, 1 or 3.
          shorter_sides: to which they will be resized; a picture that is too narrow for
            that is broken.
          start: the number of the first one, for the names of those without a file.
        """
        self._pictures, self.channels = pictures, channels
        self._shorter_sides, self._start = shorter_sides, start
        self.broken: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Example:
        picture = self._pictures[index]
        name = name_of(picture, self._start + index)
        try:
            if isinstance(picture, Image.Image):
                with self._lock:  # The same one may be given twice, and loads lazily.
                    pixels = read_picture(picture, self.channels, name)
            else:
                pixels = read_picture(picture, self.channels, name)
            for side in self._shorter_sides:
                views.refuse_narrow(pixels, side, name, MAX_IMAGE_PIXELS)
        except UserError:
            self.broken.add(index)
            raise
        return Example(pixels, -1, name)


def name_of(picture: Picture, index: int) -> str:
    """A picture's path; "image 3" if it has none."""
    path = getattr(picture, "filename", picture)
    if isinstance(path, str | os.PathLike) and os.fspath(path):
        return os.fsdecode(path)
    return f"image {index}"
