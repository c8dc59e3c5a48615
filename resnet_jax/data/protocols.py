"""The views of an image that evaluation uses: the centre, ten crops, or all of it.

Functions run on the host, uint8 in and out. Pillow resizes with antialiasing, and sizes
and places are rounded as in torchvision: the bytes equal those of its ``Resize``,
``CenterCrop`` and ``TenCrop`` on Pillow images, so published top-1 errors can be
reproduced to the last example.
"""

import numpy as np
from PIL import Image

from resnet_jax.data.images import to_array, to_pillow
from resnet_jax.errors import UserError, nearest

FULL_IMAGE_SCALES = (224, 256, 384, 480, 640)
"""Shorter sides that the paper averages over (He et al. 2015, section 3.4)."""

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def full_image(
    image: np.ndarray, shorter_side: int, interpolation: str = "bilinear"
) -> np.ndarray:
    """The whole image resized to a shorter side, for a fully-convolutional test.

    Equals torchvision's ``Resize(shorter_side)``: the aspect is kept, and the longer
    side rounded down. The paper uses ``FULL_IMAGE_SCALES``.

    Args:
      image: uint8 (h, w, c), grey (c = 1) or colour (c = 3).
      shorter_side: of the result, in pixels.
      interpolation: "bilinear" or "bicubic", antialiased.

    Returns:
      Contiguous uint8 (h', w', c) with min(h', w') = ``shorter_side``.

    Raises:
      UserError: the image or interpolation is not supported.
    """
    if interpolation not in _FILTERS:
        raise UserError(
            f"there is no interpolation {interpolation!r}: "
            f"{nearest(interpolation, _FILTERS)}"
        )
    pillow = to_pillow(image)
    width, height = _resized(pillow.width, pillow.height, shorter_side)
    return to_array(pillow.resize((width, height), _FILTERS[interpolation]))


def center_crop(
    image: np.ndarray, shorter_side: int, size: int, interpolation: str = "bilinear"
) -> np.ndarray:
    """The centre of the resized image, for the "1-crop" test.

    Equals torchvision's ``Resize(shorter_side)`` and ``CenterCrop(size)``.

    Args:
      image: uint8 (h, w, c), grey (c = 1) or colour (c = 3).
      shorter_side: pixels of the shorter side before the crop.
      size: side of the crop in pixels.
      interpolation: "bilinear" or "bicubic", antialiased.

    Returns:
      Contiguous uint8 (size, size, c).

    Raises:
      UserError: the image or interpolation is not supported, or the crop is larger than
        the resized image.
    """
    resized = _resized_for_crops(image, shorter_side, size, interpolation)
    return np.ascontiguousarray(_middle(resized, size))


def ten_crop(
    image: np.ndarray, shorter_side: int, size: int, interpolation: str = "bilinear"
) -> np.ndarray:
    """Corners and centre of the resized image and of its mirror image (AlexNet).

    Equals torchvision's ``Resize(shorter_side)`` and ``TenCrop(size)``, in its order:
    top left, top right, bottom left, bottom right, centre; then the same places of the
    image mirrored left to right. So crop 5 mirrors crop 1, crop 6 crop 0, crop 7 crop
    3 and crop 8 crop 2. Crop 9 mirrors crop 4, shifted by a column if the difference
    in width is odd.

    Args:
      image: uint8 (h, w, c), grey (c = 1) or colour (c = 3).
      shorter_side: pixels of the shorter side before the crops.
      size: side of each crop in pixels.
      interpolation: "bilinear" or "bicubic", antialiased.

    Returns:
      Contiguous uint8 (10, size, size, c).

    Raises:
      UserError: the image or interpolation is not supported, or a crop is larger than
        the resized image.
    """
    resized = _resized_for_crops(image, shorter_side, size, interpolation)
    return np.stack([*_five(resized, size), *_five(resized[:, ::-1], size)])


def _resized_for_crops(
    image: np.ndarray, shorter_side: int, size: int, interpolation: str
) -> np.ndarray:
    if shorter_side < size:
        raise UserError(
            f"crops of {size}x{size} need a shorter side of at least {size}, "
            f"not {shorter_side}"
        )
    return full_image(image, shorter_side, interpolation)


def _resized(width: int, height: int, shorter_side: int) -> tuple[int, int]:
    """Width and height at a shorter side."""
    if width <= height:
        return shorter_side, int(shorter_side * height / width)
    return int(shorter_side * width / height), shorter_side


def _middle(image: np.ndarray, size: int) -> np.ndarray:
    # Halves are rounded to even, as in torchvision.
    top = round((image.shape[0] - size) / 2)
    left = round((image.shape[1] - size) / 2)
    return image[top : top + size, left : left + size]


def _five(image: np.ndarray, size: int) -> list[np.ndarray]:
    bottom, right = image.shape[0] - size, image.shape[1] - size
    return [
        image[:size, :size],
        image[:size, right:],
        image[bottom:, :size],
        image[bottom:, right:],
        _middle(image, size),
    ]
