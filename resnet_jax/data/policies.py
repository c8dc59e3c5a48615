"""Random operations on the host's crops: RandAugment and TrivialAugment Wide.

A policy draws steps, each an operation with its argument. Pillow performs them, as in
the published recipes:

- ``randaugment`` (Cubuk et al. 2019, arXiv:1909.13719) as timm's
  ``rand-m7-mstd0.5-inc1`` and similar, the policy of "ResNet strikes back" (Wightman
  et al. 2021, arXiv:2110.00476): operations whose effect grows with their magnitude.
- ``trivialaugment`` (Müller & Hutter 2021, arXiv:2103.10158) as torchvision's
  ``TrivialAugmentWide``: one operation an image, at a random magnitude.

``draw_steps`` draws from the given generator and nothing else; ``apply_steps`` is a
deterministic function of its arguments.
"""

import dataclasses
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from resnet_jax.config.schema import AugmentationConfig
from resnet_jax.data.images import to_array, to_pillow


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an operation that moves pixels computes new ones.

    Attributes:
      resampling: Pillow's filter between pixels.
      fill: colour (red, green, blue) outside the image; its luma for grey images.
    """

    resampling: Image.Resampling
    fill: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Step:
    """One drawn operation.

    Attributes:
      operation: a name in ``OPERATIONS``.
      argument: in the operation's unit.
      sampling: for operations that move pixels; others ignore it.
    """

    operation: str
    argument: float
    sampling: Sampling


def apply_policy(
    image: np.ndarray, rng: np.random.Generator, config: AugmentationConfig
) -> np.ndarray:
    """The image after random operations of ``config.policy``.

    Args:
      image: uint8 (h, w, 1 or 3); not changed.
      rng: the only source of random numbers.
      config: its fields ``policy`` and ``policy_*``.

    Returns:
      Contiguous uint8 of the same shape; may be the given array if no operation was
      drawn.

    Raises:
      UserError: the image has neither one nor three channels.
    """
    return apply_steps(image, draw_steps(rng, config))


def draw_steps(rng: np.random.Generator, config: AugmentationConfig) -> list[Step]:
    """The steps for one image, in the order of application."""
    if config.policy is None:
        return []
    return _DRAWS[config.policy](rng, config)


def apply_steps(image: np.ndarray, steps: Sequence[Step]) -> np.ndarray:
    """A uint8 image (h, w, 1 or 3) after the steps; see ``apply_policy``."""
    if not steps:
        return np.ascontiguousarray(image)
    changed = to_pillow(image)
    for step in steps:
        changed = OPERATIONS[step.operation](changed, step.argument, step.sampling)
    return to_array(changed)


_Operation = Callable[[Image.Image, float, Sampling], Image.Image]


def _solarize_add(image: Image.Image, amount: float, _: Sampling) -> Image.Image:
    """Brightens values below 128 by ``amount`` of 255."""
    table = [min(255, i + int(amount)) if i < 128 else i for i in range(256)]
    return image.point(table * len(image.getbands()))


def _posterize(image: Image.Image, bits: float, _: Sampling) -> Image.Image:
    """Keeps the leading ``bits`` of 8; 0 bits give a black image, as in the recipes.

    ImageOps.posterize refuses 0 since Pillow 12.
    """
    mask = 256 - 2 ** (8 - int(bits))
    return image.point([i & mask for i in range(256)] * len(image.getbands()))


def _enhance(kind: Callable[[Image.Image], Any]) -> _Operation:
    """Blends with a degenerate image; a factor of 1 gives the image itself."""
    return lambda image, factor, _: kind(image).enhance(factor)


def _affine(
    coefficients: Callable[[Image.Image, float], tuple[float, ...]],
) -> _Operation:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f)."""
    return lambda image, argument, sampling: image.transform(
        image.size,
        Image.Transform.AFFINE,
        coefficients(image, argument),
        resample=sampling.resampling,
        fillcolor=_fill(image, sampling),
    )


def _rotate(image: Image.Image, degrees: float, sampling: Sampling) -> Image.Image:
    return image.rotate(
        degrees, resample=sampling.resampling, fillcolor=_fill(image, sampling)
    )


def _fill(image: Image.Image, sampling: Sampling) -> int | tuple[int, int, int]:
    if image.mode == "RGB":
        return sampling.fill
    red, green, blue = sampling.fill
    return round(0.299 * red + 0.587 * green + 0.114 * blue)


OPERATIONS: dict[str, _Operation] = {
    # No argument.
    "Identity": lambda image, *_: image,
    "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
    "Equalize": lambda image, *_: ImageOps.equalize(image),
    "Invert": lambda image, *_: ImageOps.invert(image),
    # Number of bits to keep.
    "Posterize": _posterize,
    # Threshold from which values are inverted.
    "Solarize": lambda image, threshold, _: ImageOps.solarize(image, ceil(threshold)),
    "SolarizeAdd": _solarize_add,
    # Factor: 0 gives a black, flat grey, grey or blurred image.
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Color": _enhance(ImageEnhance.Color),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    # Pixels to the left per row, or upwards per column.
    "ShearX": _affine(lambda _, slope: (1, slope, 0, 0, 1, 0)),
    "ShearY": _affine(lambda _, slope: (1, 0, 0, slope, 1, 0)),
    # Pixels to the right or downwards.
    "TranslateX": _affine(lambda _, pixels: (1, 0, -pixels, 0, 1, 0)),
    "TranslateY": _affine(lambda _, pixels: (1, 0, 0, 0, 1, -pixels)),
    # Shares of the width to the left, or of the height upwards.
    "TranslateXRelative": _affine(
        lambda image, share: (1, 0, share * image.width, 0, 1, 0)
    ),
    "TranslateYRelative": _affine(
        lambda image, share: (1, 0, 0, 0, 1, share * image.height)
    ),
    # Degrees counterclockwise about the centre.
    "Rotate": _rotate,
}
"""Functions of an image, the argument and the sampling, by name."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps a policy's magnitude to an operation's argument.

    Attributes:
      argument: function of the magnitude.
      signed: whether to negate the magnitude first for half of the images.
    """

    argument: Callable[[float], float] = lambda magnitude: 0.0
    signed: bool = False


# RandAugment.

STRONGEST = 10.0  # magnitudes are in [0, STRONGEST]
_PROBABILITY = 0.5  # that a drawn operation is applied; timm's default
_IMAGENET_MEAN = (124, 116, 104)  # timm's fill colour, its mean pixel
# timm's "random" interpolation draws one of these for each operation.
_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)

_ENHANCE = Scale(lambda magnitude: max(0.1, 1 + magnitude / STRONGEST * 0.9), True)
_SHEAR = Scale(lambda magnitude: magnitude / STRONGEST * 0.3, True)
_TRANSLATE = Scale(lambda magnitude: magnitude / STRONGEST * 0.45, True)

RANDAUGMENT = {
    "AutoContrast": Scale(),
    "Equalize": Scale(),
    "Invert": Scale(),
    "Rotate": Scale(lambda magnitude: magnitude / STRONGEST * 30, True),
    "Posterize": Scale(lambda magnitude: 4 - int(magnitude / STRONGEST * 4)),
    "Solarize": Scale(lambda magnitude: 256 - int(magnitude / STRONGEST * 256)),
    "SolarizeAdd": Scale(lambda magnitude: int(magnitude / STRONGEST * 110)),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), _ENHANCE),
    **dict.fromkeys(("ShearX", "ShearY"), _SHEAR),
    **dict.fromkeys(("TranslateXRelative", "TranslateYRelative"), _TRANSLATE),
}
"""timm's "increasing" operations, for magnitudes in [-10, 10]."""


def _draw_randaugment(
    rng: np.random.Generator, config: AugmentationConfig
) -> list[Step]:
    """Draws ``policy_operations`` with replacement, each applied with probability 0.5.

    The magnitude is normal around ``policy_magnitude``, clipped to [0, STRONGEST].
    """
    names = list(RANDAUGMENT)
    steps = []
    for place in rng.integers(len(names), size=config.policy_operations):
        if rng.random() >= _PROBABILITY:
            continue
        magnitude = rng.normal(config.policy_magnitude, config.policy_magnitude_std)
        magnitude = min(max(magnitude, 0.0), STRONGEST)
        sampling = Sampling(_FILTERS[rng.integers(len(_FILTERS))], _IMAGENET_MEAN)
        argument = _argument(RANDAUGMENT[names[place]], magnitude, rng)
        steps.append(Step(names[place], argument, sampling))
    return steps


# TrivialAugment Wide.

LAST_BIN = 30  # magnitudes are the 31 integers 0 .. LAST_BIN

# As in torchvision's training script. The paper and the default of
# ``TrivialAugmentWide()`` take the nearest pixel.
_TRIVIALAUGMENT_SAMPLING = Sampling(Image.Resampling.BILINEAR, (0, 0, 0))

_ENHANCE_WIDE = Scale(lambda magnitude: 1 + 0.99 * magnitude / LAST_BIN, True)
_SHEAR_WIDE = Scale(lambda magnitude: 0.99 * magnitude / LAST_BIN, True)
_TRANSLATE_WIDE = Scale(lambda magnitude: int(32 * magnitude / LAST_BIN), True)

TRIVIALAUGMENT = {
    "Identity": Scale(),
    **dict.fromkeys(("ShearX", "ShearY"), _SHEAR_WIDE),
    **dict.fromkeys(("TranslateX", "TranslateY"), _TRANSLATE_WIDE),
    "Rotate": Scale(lambda magnitude: 135 * magnitude / LAST_BIN, True),
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), _ENHANCE_WIDE),
    "Posterize": Scale(lambda magnitude: 8 - round(6 * magnitude / LAST_BIN)),
    "Solarize": Scale(lambda magnitude: 255 - 255 * magnitude / LAST_BIN),
    "AutoContrast": Scale(),
    "Equalize": Scale(),
}
"""The wide space, for magnitudes in -30 .. 30.

torchvision computes in float32: its arguments may differ in the seventh digit, and it
may translate by 15 pixels instead of 16."""


def _draw_trivialaugment(
    rng: np.random.Generator, config: AugmentationConfig
) -> list[Step]:
    """Draws one operation at a uniform magnitude; it is always applied."""
    del config  # TrivialAugment has no options
    names = list(TRIVIALAUGMENT)
    name = names[rng.integers(len(names))]
    magnitude = float(rng.integers(LAST_BIN, endpoint=True))
    argument = _argument(TRIVIALAUGMENT[name], magnitude, rng)
    return [Step(name, argument, _TRIVIALAUGMENT_SAMPLING)]


def _argument(scale: Scale, magnitude: float, rng: np.random.Generator) -> float:
    if scale.signed and rng.random() < 0.5:
        magnitude = -magnitude
    return scale.argument(magnitude)


_DRAWS = {"randaugment": _draw_randaugment, "trivialaugment": _draw_trivialaugment}
