"""Boxes drawn on pictures."""

import colorsys
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from resnet_jax.data.images import to_array, to_pillow
from resnet_jax.detection.annotations import Annotation
from resnet_jax.detection.detections import Detections
from resnet_jax.errors import printable

_SMALLEST, _LARGEST = 640, 1280  # pixels of the longer side of a drawn picture
_MOST_LETTERS = 24

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]


def draw_boxes(
    image: np.ndarray,
    class_names: Sequence[str],
    detections: Detections | None = None,
    annotation: Annotation | None = None,
    *,
    least_score: float = 0.5,
) -> np.ndarray:
    """A picture with the objects found in it, and those that are there.

    What was found has solid lines and a label with its score; what is there has thin
    dashed lines, dotted for difficult objects and crowds, and a label only if no
    detections are given. A class has the same colour in all pictures.

    Args:
      image: uint8 (h, w, 1 or 3), the original one.
      class_names: by class.
      detections: what was found, or None.
      annotation: what is there, or None.
      least_score: detections below are left out.

    Returns:
      Uint8 (h', w', 3), scaled so that lines and labels can be read.

    Raises:
      UserError: the image has another dtype or number of channels.
    """
    picture = to_pillow(image).convert("RGB")
    longer = max(picture.size)
    scale = min(max(longer, _SMALLEST), _LARGEST) / longer
    if scale != 1:
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    unit = max(2, round(max(picture.size) / 320))
    draw = ImageDraw.Draw(picture)
    labels = []
    if annotation is not None:
        ignored = annotation.difficult | annotation.crowd
        for box, label, faint in zip(
            scale * annotation.boxes, annotation.classes, ignored, strict=True
        ):
            dash = unit if faint else 5 * unit
            _dashed(draw, tuple(box), class_color(label), max(1, unit // 2), dash)
            if detections is None:
                labels.append((tuple(box), _short(class_names[label]), int(label)))
    if detections is not None:
        found = detections.above(least_score)
        for box, label in zip(scale * found.boxes, found.classes, strict=True):
            _solid(draw, tuple(box), class_color(label), unit)
        labels += [
            (tuple(box), f"{_short(class_names[label])} {100 * score:.0f}", int(label))
            for box, label, score in zip(
                scale * found.boxes, found.classes, found.scores, strict=True
            )
        ]
    _write(draw, picture.size, labels, _font(round(max(picture.size) / 34)))
    return to_array(picture)


def class_color(label: int) -> Color:
    """The colour of a class: neighbours differ in hue, and equal hues in brightness."""
    hue = (0.58 + 0.618034 * int(label)) % 1  # the golden ratio spreads hues evenly
    saturation, value = ((0.85, 0.95), (1.0, 0.6), (0.45, 1.0))[int(label) % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _solid(draw: ImageDraw.ImageDraw, box: Rectangle, color: Color, width: int) -> None:
    """A frame whose outer edge is the box's, with a dark line around it."""
    x1, y1, x2, y2 = box
    # Pillow includes the last pixel.
    outer = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
    draw.rectangle((x1 - 1, y1 - 1, outer[2] + 1, outer[3] + 1), outline=(0, 0, 0))
    draw.rectangle(outer, outline=color, width=width)


def _dashed(
    draw: ImageDraw.ImageDraw, box: Rectangle, color: Color, width: int, dash: int
) -> None:
    """A dashed frame on a dark one, so that it shows on any ground."""
    x1, y1, x2, y2 = box
    x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)
    sides = (
        *(((x1, y), (x2, y)) for y in (y1, y2)),
        *(((x, y1), (x, y2)) for x in (x1, x2)),
    )
    for (ax, ay), (bx, by) in sides:
        draw.line((ax, ay, bx, by), fill=(0, 0, 0), width=width)
        length = max(bx - ax, by - ay, 1)
        for start in np.arange(0, length, 2 * dash):
            low, high = start / length, min(1, (start + dash) / length)
            ends = [(ax + t * (bx - ax), ay + t * (by - ay)) for t in (low, high)]
            draw.line(ends, fill=color, width=width)


def _write(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    labels: Sequence[tuple[Rectangle, str, int]],
    font: ImageFont.FreeTypeFont,
) -> None:
    """Writes labels beside their boxes, where possible not on another label."""
    taken: list[Rectangle] = []
    for box, text, _ in labels:
        _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
        places = list(_places(box, size, right + 3, bottom + 2))
        taken.append(next((p for p in places if not _meets(p, taken)), places[0]))
    # The first label, of the highest score, ends on top.
    for place, (_, text, label) in reversed(list(zip(taken, labels, strict=True))):
        color = class_color(label)
        bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
        draw.rectangle(place, fill=color)
        ink = (0, 0, 0) if bright else (255, 255, 255)
        draw.text((place[0] + 2, place[1]), text, fill=ink, font=font)


def _places(
    box: Rectangle, size: tuple[int, int], width: float, height: float
) -> Iterator[Rectangle]:
    """Where a label may stand: above, in a corner of, and below its box."""
    x1, y1, x2, y2 = box
    corners = (
        *((x1, y1 - height), (x1, y1), (x2 - width, y1)),
        *((x1, y2 - height), (x2 - width, y2 - height), (x1, y2)),
    )
    for x, y in corners:
        x = min(max(x, 0), max(0, size[0] - width))
        y = min(max(y, 0), max(0, size[1] - height))
        yield x, y, x + width, y + height


def _meets(place: Rectangle, others: Sequence[Rectangle]) -> bool:
    x1, y1, x2, y2 = place
    return any(x1 < o[2] and o[0] < x2 and y1 < o[3] and o[1] < y2 for o in others)


def _short(name: str) -> str:
    line = " ".join(printable(name).split())
    return line if len(line) <= _MOST_LETTERS else f"{line[: _MOST_LETTERS - 1]}\u2026"


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib's, which knows more letters than Pillow's.
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / "DejaVuSans.ttf", max(size, 11))
