"""Pictures side by side, with captions."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from resnet_jax.analysis.plots import literal
from resnet_jax.data.images import to_pillow
from resnet_jax.errors import UserError

_SMALL = 100  # pixels of a side up to which a pixel is drawn as a square
_WRONG = "#c92a1a"


def gallery(
    pictures: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[object] | None = None,
    *,
    correct: Sequence[bool] | np.ndarray | None = None,
    title: str = "",
    columns: int = 8,
    side: float = 1.2,
) -> Figure:
    """A figure of pictures in rows, each below its caption.

    Args:
      pictures: uint8 arrays (h, w), (h, w, 1) or (h, w, 3), of any sizes.
      captions: a text for each picture.
      correct: whether each caption is right; wrong ones are red and bold.
      title: above them all.
      columns: the most pictures in a row.
      side: of the square around a picture, in inches.

    Raises:
      UserError: there is no picture, or not one caption or mark for each.
    """
    count = len(pictures)
    if not count:
        raise UserError("there are no pictures to draw")
    for name, given in (("captions", captions), ("marks in correct", correct)):
        if given is not None and len(given) != count:
            raise UserError(f"{count} pictures need {count} {name}, not {len(given)}")
    columns = min(columns, count)
    rows = -(-count // columns)
    lines = 0 if captions is None else max(str(c).count("\n") + 1 for c in captions)
    figure = Figure(
        (side * columns, (side + 0.18 * lines) * rows), layout="constrained"
    )
    if title:
        figure.suptitle(literal(title))
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for index, axes in enumerate(panels):
        axes.set_axis_off()
        if index < count:
            pixels = np.asarray(to_pillow(_with_channels(pictures[index])))
            smooth = "nearest" if max(pixels.shape) <= _SMALL else "antialiased"
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation=smooth)
        if index < count and captions is not None:
            wrong = correct is not None and not correct[index]
            text = str(captions[index])
            most = round(15 * side)  # characters beside each other
            axes.set_title(
                literal("\n".join(_shortened(line, most) for line in text.split("\n"))),
                fontsize=9,
                color=_WRONG if wrong else "black",
                fontweight="bold" if wrong else "normal",
            )
    return figure


def _shortened(line: str, most: int) -> str:
    """A line of a caption; of a long one, the name is cut and its share kept."""
    name, colon, share = line.rpartition(": ")
    room = most - len(colon + share)
    if len(line) <= most:
        return line
    if room < 2:
        return f"{line[: most - 1]}\u2026"
    return f"{name[: room - 1]}\u2026{colon}{share}"


def _with_channels(picture: np.ndarray) -> np.ndarray:
    return picture[..., None] if picture.ndim == 2 else picture
