"""Normalisation and augmentation on the device, inside the jitted step.

Pure functions of batches (n, h, w, c). Random numbers are drawn for the global batch,
so results do not depend on the number of devices. Some functions come in pairs: one
draws random numbers from a key, the other applies them.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config.schema import AugmentationConfig
from resnet_jax.models.fused import along

MAX_PIXEL = 255.0

# Folded into the key, so that a new operation does not change the numbers of others.
_JITTER, _ERASING, _MIXING = 1, 2, 3

_GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601

# Erased share of an image, height over width, and rectangles drawn until one fits
# (Zhong et al. 2017, as in torchvision).
ERASED_AREA = (0.02, 0.33)
ERASED_ASPECT = (0.3, 3.3)
ERASING_ATTEMPTS = 10

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
    """Mean and deviation of pixels in [0, 1], float32 (h, w, c) or (1, 1, c)."""

    mean: jax.Array | np.ndarray
    std: jax.Array | np.ndarray


def run_key(seed: int) -> jax.Array:
    """The key of a run's steps: each folds its number in."""
    return jax.random.split(jax.random.key(seed))[1]


def normalize(images: jax.Array, statistics: PixelStatistics) -> jax.Array:
    """Subtracts the mean from float32 pixels in [0, 1] and divides by the deviation."""
    return (images - statistics.mean[None]) / statistics.std[None]


def to_unit(images: jax.Array) -> jax.Array:
    """Uint8 pixels as float32 in [0, 1]."""
    return images.astype(jnp.float32) / MAX_PIXEL


def augment(
    key: jax.Array,
    images: jax.Array,
    statistics: PixelStatistics,
    config: AugmentationConfig,
) -> jax.Array:
    """Augments and normalises uint8 images; returns float32.

    Colours change before the normalisation. Flip, crop and erasing come after it, so
    that padded and erased zeros are mean pixels, as in the papers.
    """
    color_key, flip_key, crop_key = jax.random.split(key, 3)
    images = to_unit(images)
    if config.color_jitter is not None:
        jitter_key = jax.random.fold_in(key, _JITTER)
        images = color_jitter(jitter_key, images, config.color_jitter)
    if config.color_noise:
        images = add_color_noise(color_key, images, config.color_noise)
    images = normalize(images, statistics)
    if config.flip and not config.on_host:
        images = flip(flip_key, images)
    if config.pad:
        images = pad_and_crop(crop_key, images, config.pad)
    if config.erasing_probability:
        erasing_key = jax.random.fold_in(key, _ERASING)
        images = erase(erasing_key, images, config.erasing_probability)
    return images


def augment_and_mix(
    key: jax.Array,
    images: jax.Array,
    statistics: PixelStatistics,
    config: AugmentationConfig,
) -> tuple[jax.Array, jax.Array | None]:
    """The images of ``augment``, mixed by ``mix`` if the config sets an alpha.

    Returns:
      The images, and the share (float32, in [0, 1]) that each keeps of itself: the
      weight of its own label in ``mixed_targets``. None if nothing is mixed.
    """
    images = augment(key, images, statistics, config)
    if not (config.mixup_alpha or config.cutmix_alpha):
        return images, None
    mixing_key = jax.random.fold_in(key, _MIXING)
    return mix(mixing_key, images, config.mixup_alpha, config.cutmix_alpha)


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2."""
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def pad_and_crop(key: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """Pads each side with ``pad`` zeros and crops the original size at random."""
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pad + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def add_color_noise(key: jax.Array, images: jax.Array, deviation: float) -> jax.Array:
    """Shifts each image's colour along the principal axes of ImageNet (AlexNet).

    The shift along an axis is its eigenvalue times a number from N(0, deviation^2).
    """
    amounts = deviation * jax.random.normal(key, (images.shape[0], 3))
    shift = (amounts * _COLOR_EIGENVALUES[None]) @ _COLOR_EIGENVECTORS.T
    return images + shift[:, None, None, :]


def color_jitter(
    key: jax.Array, images: jax.Array, strengths: Sequence[float]
) -> jax.Array:
    """Changes brightness, contrast and saturation of images (n, h, w, 3) in [0, 1].

    Each factor is drawn from U(1 - strength, 1 + strength), as in fb.resnet.torch
    (Howard 2013). Values outside [0, 1] are not clipped, so the changes commute, and
    the random order of other implementations makes no difference.
    """
    spread = jnp.asarray(strengths, jnp.float32)
    factors = jax.random.uniform(
        key, (images.shape[0], 3), minval=1 - spread, maxval=1 + spread
    )
    return jitter_colors(images, factors)


def jitter_colors(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Applies factors (n, 3) of brightness, contrast and saturation.

    A factor f turns the image x into f x + (1 - f) y, where y is black for brightness,
    the mean grey value for contrast, and the grey image for saturation.
    """
    brightness, contrast, saturation = factors.T[..., None, None, None]
    images = brightness * images
    mean = _grey(images).mean((1, 2), keepdims=True)
    images = contrast * images + (1 - contrast) * mean
    return saturation * images + (1 - saturation) * _grey(images)


def _grey(images: jax.Array) -> jax.Array:
    """Grey values (n, h, w, 1)."""
    return (images * _GREY_WEIGHTS[None, None, None]).sum(-1, keepdims=True)


def erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Sets a random rectangle to zero, with ``probability`` (Zhong et al. 2017).

    The rectangle's share of the area is uniform over ``ERASED_AREA``, and the logarithm
    of its aspect over ``ERASED_ASPECT``. It is drawn up to ``ERASING_ATTEMPTS`` times,
    until it is smaller than the image on both sides. Its place is uniform.
    """
    chosen_key, box_key = jax.random.split(key)
    count, height, width = images.shape[:3]
    chosen = jax.random.uniform(chosen_key, (count,)) < probability
    boxes = erasing_boxes(box_key, count, height, width)
    erased = inside_boxes(boxes, height, width) & chosen[:, None, None]
    return jnp.where(erased[..., None], 0.0, images)


def erasing_boxes(key: jax.Array, count: int, height: int, width: int) -> jax.Array:
    """Rectangles to erase, (count, 4) int32: top, left, bottom, right (exclusive).

    A rectangle is empty if none of its attempts fits.
    """
    area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
    shape = (count, ERASING_ATTEMPTS)
    low, high = ERASED_AREA
    area = height * width * jax.random.uniform(area_key, shape, minval=low, maxval=high)
    low, high = np.log(ERASED_ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspect_key, shape, minval=low, maxval=high))
    rows = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    columns = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (rows < height) & (columns < width)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    rows, columns, fits = (
        jnp.take_along_axis(values, first, axis=1)[:, 0]
        for values in (rows, columns, fits)
    )
    rows, columns = jnp.where(fits, rows, 0), jnp.where(fits, columns, 0)
    top = jax.random.randint(top_key, (count,), 0, height - rows + 1)
    left = jax.random.randint(left_key, (count,), 0, width - columns + 1)
    return jnp.stack([top, left, top + rows, left + columns], axis=1)


def inside_boxes(boxes: jax.Array, height: int, width: int) -> jax.Array:
    """Whether pixels are in rectangles (..., 4), as booleans (..., height, width)."""
    top, left, bottom, right = jnp.moveaxis(boxes[..., None, None], -3, 0)
    row = along(jnp.arange(height)[:, None], top)
    column = along(jnp.arange(width), top)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def mix(
    key: jax.Array, images: jax.Array, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image with its partner by mixup or cutmix; also returns its own share.

    An alpha of 0 disables its kind. If both are set, each batch uses one of them with
    probability 1/2. A batch has one lambda, drawn from Beta(alpha, alpha), and one
    rectangle. The partner of image i is image n - 1 - i: repeated copies of an example
    are neighbours, so almost none of them are partners.

    Sources: mixup, Zhang et al. 2017; cutmix, Yun et al. 2019.
    """
    choice_key, share_key, box_key = jax.random.split(key, 3)
    height, width = images.shape[1:3]
    pastes = jax.random.bernoulli(choice_key) if mixup_alpha else jnp.array(True)
    pastes = pastes & (cutmix_alpha > 0)
    # A disabled kind's alpha is never used; 1 keeps the expression defined.
    alpha = jnp.where(pastes, cutmix_alpha or 1.0, mixup_alpha or 1.0)
    share = jax.random.beta(share_key, alpha, alpha)
    center = jax.random.randint(
        box_key, (2,), jnp.zeros(2, jnp.int32), jnp.array([height, width])
    )
    box = cutmix_box(share, center, height, width)
    return jax.lax.cond(
        pastes, lambda: cutmix(images, box), lambda: (mixup(images, share), share)
    )


def mixup(images: jax.Array, share: jax.Array) -> jax.Array:
    """``share`` times each image plus (1 - share) times its partner."""
    return share * images + (1 - share) * images[::-1]


def cutmix_box(
    share: jax.Array, center: jax.Array, height: int, width: int
) -> jax.Array:
    """The rectangle that cutmix pastes, (4,) int32: top, left, bottom, right.

    Its sides are sqrt(1 - share) times the image's, rounded down, around the pixel
    ``center`` (row, column); parts outside the image are cut off.
    """
    size = jnp.array([height, width])
    sides = jnp.floor(size.astype(share.dtype) * jnp.sqrt(1 - share)).astype(jnp.int32)
    start = center - sides // 2
    return jnp.concatenate([jnp.clip(start, 0, size), jnp.clip(start + sides, 0, size)])


def cutmix(images: jax.Array, box: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pastes a rectangle (top, left, bottom, right) of each image's partner into it.

    Also returns the share that each image keeps.
    """
    height, width = images.shape[1:3]
    pasted = inside_boxes(box, height, width)[None, :, :, None]
    top, left, bottom, right = box
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return jnp.where(pasted, images[::-1], images), share


def mixed_targets(labels: jax.Array, share: jax.Array, num_classes: int) -> jax.Array:
    """The soft labels (n, num_classes) of mixed images, float32; rows sum to 1."""
    targets = jax.nn.one_hot(labels, num_classes)
    return share * targets + (1 - share) * targets[::-1]
