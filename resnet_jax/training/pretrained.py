"""What a run must know of the weights it starts from."""

from collections.abc import Callable

import numpy as np

from resnet_jax.config import Config
from resnet_jax.data.dataset import Dataset
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.errors import UserError
from resnet_jax.evaluation.nets import expected_pixels

_SAME = 0.02
"""Largest difference of means and deviations of pixels in [0, 1] without a warning."""


def pixel_statistics(
    config: Config, dataset: Dataset, warn: Callable[[str], None]
) -> PixelStatistics:
    """The statistics by which a run normalises its pixels.

    With ``data.normalization=weights``, the ones that ``model.weights`` expect.
    Otherwise they follow from the data, and ``warn`` gets a sentence if the weights
    expect others.

    Raises:
      UserError: nothing says what the weights expect, or it has other channels.
    """
    weights, asked = config.model.weights, config.data.normalization == "weights"
    if weights is None:
        return dataset.train.statistics()
    try:
        expected = expected_pixels(weights, config.model.name)
    except UserError:  # such as a net whose options its file does not name
        expected = None
    if asked:
        if expected is None:
            raise UserError(
                f"{weights} does not say what pixels it expects, so that "
                "data.normalization cannot be weights: set it to the normalisation of "
                "their training"
            )
        channels = np.shape(expected.mean)[-1]
        if channels != dataset.image_shape[-1]:
            raise UserError(
                f"{weights} expects {channels}-channel images, but these have "
                f"{dataset.image_shape[-1]}: set data.normalization to per_channel"
            )
        # A mean image fits images of its own size alone: its average fits all.
        mean, std = (_channels(x)[None, None] for x in (expected.mean, expected.std))
        return PixelStatistics(mean, std)
    found = dataset.train.statistics()
    if expected is not None and _differ(expected, found):
        warn(
            f"warning: {weights} was trained on pixels of {_describe(expected)}, and "
            f"data.normalization={config.data.normalization} uses {_describe(found)}: "
            "set it to weights"
        )
    return found


def _differ(one: PixelStatistics, other: PixelStatistics) -> bool:
    pairs = ((one.mean, other.mean), (one.std, other.std))
    return any(np.abs(_channels(a) - _channels(b)).max() > _SAME for a, b in pairs)


def _channels(values: object) -> np.ndarray:
    """One float32 number for each channel, of (h, w, c)."""
    return np.asarray(values, np.float32).mean((0, 1))


def _describe(pixels: PixelStatistics) -> str:
    mean, std = (
        ", ".join(f"{x:.3g}" for x in _channels(values))
        for values in (pixels.mean, pixels.std)
    )
    return f"mean {mean} and deviation {std}"
