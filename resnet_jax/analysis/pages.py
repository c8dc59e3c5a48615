"""Self-contained HTML pages, pictures included.

One style serves all pages: wide windows and phones, light and dark.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from resnet_jax.data.images import to_pillow
from resnet_jax.errors import printable

_STYLE = """
:root { color-scheme: light dark; --text: #222; --back: #fff; --faint: #666;
  --line: #ddd; --bar: #47a; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --back: #181818; --faint: #aaa; --line: #444; --bar: #7ad; }
  /* Figures have no background. Black lines turn light, and hues stay. */
  svg { filter: invert(.88) hue-rotate(180deg); }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--back); max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin-top: 1.5rem; }
h1, h2, h3, p { overflow-wrap: anywhere; }
.error { font-size: 1.35rem; font-weight: 600; }
.note, th, figcaption { color: var(--faint); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
td, th { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
th { font-weight: 400; }
.facts td { overflow-wrap: anywhere; } .facts th { white-space: nowrap; }
.grid { border-collapse: separate; border-spacing: 0; }
.grid td, .grid th { border-bottom: 1px solid var(--line); }
.grid .number { text-align: right; font-variant-numeric: tabular-nums; }
.grid .number, .grid tr > :first-child { white-space: nowrap; }
.grid tr > :first-child { position: sticky; left: 0; background: var(--back); }
details { margin: 1rem 0; }
summary { cursor: pointer; }
svg { display: block; max-width: 100%; height: auto; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; max-height: 20rem; object-fit: contain; }
figure img.tiny { image-rendering: pixelated; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; white-space: pre-line; }
.pictures { display: grid; gap: .8rem .6rem;
  grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); }
.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.large figure img { max-height: none; }
.beside { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.beside figure { flex: 1 1 10rem; max-width: 14rem; }
.bars { list-style: none; margin: 0; padding: 0; flex: 1 1 16rem; min-width: 0; }
.bars li { display: grid; grid-template-columns: 1fr auto; gap: 0 1rem;
  margin-bottom: .5rem; }
.bars span { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.bars i { grid-column: 1 / -1; height: .4rem; min-width: 1px;
  background: var(--bar); }
@media (max-width: 40rem) {
  .facts, .facts tbody, .facts tr, .facts th, .facts td { display: block; }
  .facts th { padding: .4rem 0 0; } .facts td { padding: 0; }
  .grid td, .grid th { white-space: nowrap; }
  .pictures:not(.large) {
    grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)); }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<h1>{title}</h1>
{body}
</html>
"""

_SMALLEST = 0.6  # share of its size to which a narrow window shrinks a figure
_NUMBER = re.compile(r"[\d.,]+( ?[%\u00b1(].*| of .*| (h|min|s)\b.*)?")
_TINY = 64  # pixels of a side up to which pixels are shown as squares


def escape(text: str) -> str:
    """Text as HTML, without control characters."""
    return html.escape(printable(text))


def page(title: str, *parts: str) -> str:
    """A page with a title and HTML parts."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(parts))


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, style: str | None = None) -> str:
    """A paragraph; ``style`` is "error" for the main figure, or "note"."""
    mark = f' class="{style}"' if style else ""
    return f"<p{mark}>{escape(text)}</p>"


def folded(summary: str, *parts: str) -> str:
    """Parts that a click on the summary shows."""
    body = "\n".join(parts)
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def facts(values: Mapping[str, Any]) -> str:
    """A table of names and values; in a narrow window, each value below its name."""
    rows = [
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in values.items()
    ]
    return "\n".join(['<table class="facts">', *rows, "</table>"])


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a head; numbers are right-aligned. A narrow window scrolls it."""

    def cell(text: str) -> str:
        mark = ' class="number"' if _NUMBER.fullmatch(text) else ""
        return f"<td{mark}>{escape(text)}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows]
    start, end = '<div class="wide"><table class="grid">', "</table></div>"
    return "\n".join([start, f"<tr>{head}</tr>", *body, end])


def svg(figure: Any) -> str:
    """A matplotlib figure as a part for ``page``.

    It has no background of its own. A narrow window scrolls a wide figure.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    least = f"{_SMALLEST * figure.get_figwidth():.1f}in"
    text = text[text.index("<svg") :].replace(
        "<svg", f'<svg style="min-width: {least}"', 1
    )
    return f'<div class="wide">{text}</div>'


def picture(pixels: np.ndarray, caption: str, side: int = 320) -> str:
    """An embedded picture with a caption, of which line breaks are kept.

    Args:
      pixels: uint8 (h, w, 1 or 3).
      caption: text.
      side: a picture with a longer side is scaled down to this many pixels.
    """
    image = to_pillow(pixels)
    tiny = max(image.size) <= _TINY
    if max(image.size) > side:
        shares = (length * side / max(image.size) for length in image.size)
        width, height = (max(1, round(length)) for length in shares)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    kind = "png" if tiny else "jpeg"
    image.save(file, kind, **({} if tiny else {"quality": 85}))
    data = base64.b64encode(file.getvalue()).decode()
    text = escape(caption)
    mark = ' class="tiny"' if tiny else ""
    return (
        f'<figure><img{mark} alt="{text}" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def pictures(
    images: Iterable[np.ndarray], captions: Iterable[str], *, large: bool = False
) -> str:
    """Small pictures in rows, or large ones with lines and text; see ``picture``."""
    shown = (
        picture(image, caption, side=720 if large else 160)
        for image, caption in zip(images, captions, strict=True)
    )
    mark = "pictures large" if large else "pictures"
    return "\n".join([f'<div class="{mark}">', *shown, "</div>"])
