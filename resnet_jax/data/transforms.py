"""Normalisation and augmentation on the device, inside the jitted step.

Pure functions of batches (n, h, w, c). Each image draws from a key of its own place
in the global batch, so that results do not depend on the number of devices.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config.schema import AugmentationConfig

MAX_PIXEL = 255.0

# Eigenvalues and eigenvectors (columns) of the covariance of ImageNet's RGB pixels in
# [0, 1], as published with fb.resnet.torch.
_COLOR_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045], np.float32)
_COLOR_EIGENVECTORS = np.array(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ],
    np.float32,
)


@flax.struct.dataclass
class PixelStatistics:
    """What normalisation subtracts and divides by, for pixels in [0, 1].

    Attributes:
      mean: (h, w, c) for a per-pixel mean, (1, 1, c) otherwise; float32.
      std: of the same shape.
    """

    mean: jax.Array | np.ndarray
    std: jax.Array | np.ndarray


def normalize(images: jax.Array, statistics: PixelStatistics) -> jax.Array:
    """Pixels in [0, 1], float32, with the mean subtracted, over the deviation."""
    return (images - statistics.mean) / statistics.std


def to_unit(images: jax.Array) -> jax.Array:
    """Uint8 pixels as float32 in [0, 1]."""
    return images.astype(jnp.float32) / MAX_PIXEL


def augment(
    key: jax.Array,
    images: jax.Array,
    statistics: PixelStatistics,
    config: AugmentationConfig,
) -> jax.Array:
    """Uint8 images to normalised, randomly changed float32 images.

    Colour noise comes before the normalisation, flip and crop after it: the padding's
    zeros are mean pixels, as in the paper.
    """
    color_key, flip_key, crop_key = jax.random.split(key, 3)
    images = to_unit(images)
    if config.color_noise:
        images = add_color_noise(color_key, images, config.color_noise)
    images = normalize(images, statistics)
    if config.flip:
        images = flip(flip_key, images)
    if config.pad:
        images = pad_and_crop(crop_key, images, config.pad)
    return images


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def pad_and_crop(key: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """Pads ``pad`` zeros a side and cuts a window of the old size at a random place."""
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pad + 1)
    crop = functools.partial(_window, shape=images.shape[1:])
    return jax.vmap(crop)(padded, corners)


def _window(image: jax.Array, corner: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)


def add_color_noise(key: jax.Array, images: jax.Array, deviation: float) -> jax.Array:
    """Moves each image's colour along the principal axes of ImageNet's (AlexNet).

    A normal number of standard deviation ``deviation`` an axis, times its eigenvalue.
    """
    amounts = deviation * jax.random.normal(key, (images.shape[0], 3))
    shift = (amounts * _COLOR_EIGENVALUES) @ _COLOR_EIGENVECTORS.T
    return images + shift[:, None, None, :]
