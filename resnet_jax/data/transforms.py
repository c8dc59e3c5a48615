"""Normalisation and augmentation on the device, inside the jitted step.

Pure functions of batches (n, h, w, c). Each image draws from a key of its own place
in the global batch, so that results do not depend on the number of devices. Where a
function has a twin without a key, the twin does the work for given numbers and the
function draws them.
"""

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config.schema import AugmentationConfig

MAX_PIXEL = 255.0

# Folded into the key of the older operations: a new one leaves their numbers as they
# are.
_JITTER, _ERASING, _MIXING = 1, 2, 3

_GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue in a pixel's grey value (ITU-R BT.601)."""

ERASED_AREA = (0.02, 0.33)
"""Smallest and largest share of an image that erasing takes (Zhong et al. 2017, as in
torchvision)."""

ERASED_ASPECT = (0.3, 3.3)
"""Smallest and largest height over width of what is erased (likewise)."""

ERASING_ATTEMPTS = 10
"""Rectangles drawn for an image until one fits (likewise)."""

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

    What changes colours comes before the normalisation; flip, crop and erasing after
    it: the zeros of padding and of what is erased are mean pixels, as in the papers.
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
    """The images of ``augment``, mixed by ``mix`` where the config says so.

    Returns:
      The images, and the share (float32, in [0, 1]) that an image keeps of itself: the
      weight of its own label in ``mixed_targets``. None where nothing is mixed.
    """
    images = augment(key, images, statistics, config)
    if not (config.mixup_alpha or config.cutmix_alpha):
        return images, None
    mixing_key = jax.random.fold_in(key, _MIXING)
    return mix(mixing_key, images, config.mixup_alpha, config.cutmix_alpha)


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


def color_jitter(
    key: jax.Array, images: jax.Array, strengths: Sequence[float]
) -> jax.Array:
    """Changes brightness, contrast and saturation of each image (Howard 2013).

    As in fb.resnet.torch: of each a factor from U(1 - strength, 1 + strength), and no
    clipping of what leaves [0, 1]. So they commute: the random order that others do
    them in makes no difference.

    Args:
      key: of the draw.
      images: (n, h, w, 3) in [0, 1].
      strengths: largest relative change of brightness, contrast and saturation.
    """
    spread = jnp.asarray(strengths, jnp.float32)
    factors = jax.random.uniform(
        key, (images.shape[0], 3), minval=1 - spread, maxval=1 + spread
    )
    return jitter_colors(images, factors)


def jitter_colors(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Blends each image with black, its mean grey and its grey self.

    A factor f makes f x + (1 - f) y of the image x, where y is black for brightness,
    the mean of the image's grey values for contrast, the grey image for saturation.

    Args:
      images: (n, h, w, 3), float32.
      factors: (n, 3), of brightness, contrast and saturation.
    """
    brightness, contrast, saturation = jnp.moveaxis(factors, 1, 0)[
        ..., None, None, None
    ]
    images = brightness * images
    mean = _grey(images).mean((1, 2), keepdims=True)
    images = contrast * images + (1 - contrast) * mean
    return saturation * images + (1 - saturation) * _grey(images)


def _grey(images: jax.Array) -> jax.Array:
    """Grey values (n, h, w, 1)."""
    return (images * _GREY_WEIGHTS).sum(-1, keepdims=True)


def erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Sets a random rectangle of an image to zero (Zhong et al. 2017).

    It is done to each image with ``probability``. The rectangle has a share of the
    area from U(``ERASED_AREA``) and an aspect whose logarithm is uniform over
    ``ERASED_ASPECT``; it is drawn until it is smaller than the image on both sides, at
    most ``ERASING_ATTEMPTS`` times, and lies at a uniform place. On normalised images
    the zeros are mean pixels.
    """
    chosen_key, box_key = jax.random.split(key)
    count, height, width = images.shape[:3]
    chosen = jax.random.uniform(chosen_key, (count,)) < probability
    boxes = erasing_boxes(box_key, count, height, width)
    erased = inside_boxes(boxes, height, width) & chosen[:, None, None]
    return jnp.where(erased[..., None], 0.0, images)


def erasing_boxes(key: jax.Array, count: int, height: int, width: int) -> jax.Array:
    """Rectangles to erase, (count, 4) int32: top, left, bottom, right (exclusive).

    Where none of the attempts gave one that fits, it is empty.
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
    """Which pixels lie in rectangles (..., 4), as booleans (..., height, width)."""
    top, left, bottom, right = jnp.moveaxis(boxes[..., None, None], -3, 0)
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def mix(
    key: jax.Array, images: jax.Array, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image with its partner, by mixup, by cutmix, or by one of both.

    An alpha of 0 leaves its kind out; where both are set, each batch takes one of them
    with probability 1/2. A batch has one lambda, drawn from Beta(alpha, alpha), and
    one rectangle. The partner of image i is image n - 1 - i: copies that augmentation
    repeats lie side by side, and nearly none of them meets another.

    Returns:
      The images, and the share that each keeps of itself.

    Sources: mixup, Zhang et al. 2017; cutmix, Yun et al. 2019.
    """
    choice_key, share_key, box_key = jax.random.split(key, 3)
    height, width = images.shape[1:3]
    pastes = jax.random.bernoulli(choice_key) if mixup_alpha else jnp.array(True)
    pastes = pastes & (cutmix_alpha > 0)
    # The alpha of the kind that is not taken is never looked at: any will do.
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
    """``share`` of each image, and the rest of its partner."""
    return share * images + (1 - share) * images[::-1]


def cutmix_box(
    share: jax.Array, center: jax.Array, height: int, width: int
) -> jax.Array:
    """The rectangle that cutmix pastes, (4,) int32: top, left, bottom, right.

    Its sides are sqrt(1 - share) of the image's, rounded down, about the pixel
    ``center`` (row, column); what lies outside of the image is cut off.
    """
    size = jnp.array([height, width])
    sides = jnp.floor(size * jnp.sqrt(1 - share)).astype(jnp.int32)
    start = center - sides // 2
    return jnp.concatenate([jnp.clip(start, 0, size), jnp.clip(start + sides, 0, size)])


def cutmix(images: jax.Array, box: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pastes a rectangle (top, left, bottom, right) of each image's partner into it.

    Returns:
      The images, and the share that is left of each: by the rectangle's true area.
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
