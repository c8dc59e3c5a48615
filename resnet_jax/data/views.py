"""The views of an image that evaluation uses: the centre, ten crops, or all of it.

Functions run on the host, uint8 in and out. They return the same bytes as torchvision's
``Resize``, ``CenterCrop`` and ``TenCrop`` on Pillow images, so published top-1 errors
can be reproduced to the last example.
"""

import numpy as np
from PIL import Image

from resnet_jax.data.images import to_array, to_pillow
from resnet_jax.errors import UserError, nearest

# Shorter sides that the paper averages over (He et al. 2015, section 3.4).
FULL_IMAGE_SCALES = (224, 256, 384, 480, 640)

_FILTERS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic")}


def full_image(
    image: np.ndarray, shorter_side: int, interpolation: str = "bilinear"
) -> np.ndarray:
    """The whole image resized to a shorter side, for a fully-convolutional test.

    Equals torchvision's ``Resize(shorter_side)``: the aspect is kept, and the longer
    side rounded down. The paper uses ``FULL_IMAGE_SCALES``.

    Args:
      image: uint8 (h, w, 1 or 3).
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
    size = _resized(pillow.width, pillow.height, shorter_side)
    return to_array(pillow.resize(size, _FILTERS[interpolation]))


def center_crop(
    image: np.ndarray, shorter_side: int, size: int, interpolation: str = "bilinear"
) -> np.ndarray:
    """The centre of ``full_image``, contiguous uint8 (size, size, c).

    Equals torchvision's ``Resize(shorter_side)`` and ``CenterCrop(size)``.

    Raises:
      UserError: as in ``full_image``, or the crop is larger than the resized image.
    """
    resized = _resized_for_crops(image, shorter_side, size, interpolation)
    return np.ascontiguousarray(_middle(resized, size))


def ten_crop(
    image: np.ndarray, shorter_side: int, size: int, interpolation: str = "bilinear"
) -> np.ndarray:
    """Corners and centre of ``full_image`` and of its mirror image (AlexNet).

    Equals torchvision's ``Resize(shorter_side)`` and ``TenCrop(size)``, in its order:
    top left, top right, bottom left, bottom right, centre; then the same places of the
    image mirrored left to right.

    Returns:
      Contiguous uint8 (10, size, size, c).

    Raises:
      UserError: as in ``full_image``, or a crop is larger than the resized image.
    """
    resized = _resized_for_crops(image, shorter_side, size, interpolation)
    return np.stack([*_five(resized, size), *_five(resized[:, ::-1], size)])


def refuse_narrow(
    image: np.ndarray, shorter_side: int, name: str, max_pixels: int
) -> None:
    """Raises UserError for a line of pixels, which is huge at a shorter side.

    Args:
      image: (h, w, c).
      shorter_side: to which it would be resized, in pixels.
      name: of the image, for the error.
      max_pixels: data.max_image_pixels.
    """
    height, width = image.shape[:2]
    if shorter_side**2 * max(height, width) > max_pixels * min(height, width):
        raise UserError(
            f"image {name} is {width} x {height}: resized to a shorter side of "
            f"{shorter_side}, it exceeds data.max_image_pixels={max_pixels}; replace it"
        )


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
