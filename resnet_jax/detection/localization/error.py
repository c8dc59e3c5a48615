"""ILSVRC's localisation error."""

from collections.abc import Sequence

import numpy as np


def localization_error(
    found: np.ndarray,
    guesses: np.ndarray,
    boxes: Sequence[np.ndarray],
    classes: np.ndarray,
    threshold: float = 0.5,
) -> dict[str, float]:
    """ILSVRC's localisation error.

    An image counts as right if one of its guesses names its class, with a box whose IoU
    with one of the image's boxes is at least ``threshold``.

    Args:
      found: float32 (n, k, 4).
      guesses: integers (n, k), the class of each box.
      boxes: n arrays (g, 4).
      classes: integers (n,).
      threshold: the least IoU.

    Returns:
      ``localization_error`` and ``classification_error``, shares of the images;
      ``images``, n; ``guesses``, k.
    """
    named = guesses == np.asarray(classes)[:, None]
    hit = np.array(
        [
            (_overlaps(own, true) >= threshold).any(axis=1)
            for own, true in zip(found, boxes, strict=True)
        ]
    )
    return {
        "localization_error": float(np.mean(~(named & hit).any(axis=1))),
        "classification_error": float(np.mean(~named.any(axis=1))),
        "images": len(guesses),
        "guesses": guesses.shape[1],
    }


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU (n, m) in float64 on the host: images differ in their number of boxes."""
    a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
    corners = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    both = areas(np.concatenate(corners, axis=-1))
    return both / np.maximum(areas(a) + areas(b) - both, 1e-12)


def areas(boxes: np.ndarray) -> np.ndarray:
    """Areas (...) of boxes (..., 4); 0 for a box whose corners are swapped."""
    return (boxes[..., 2:] - boxes[..., :2]).clip(0).prod(-1)
