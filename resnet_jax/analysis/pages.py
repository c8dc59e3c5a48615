"""Self-contained HTML pages, pictures included."""

import html
import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from resnet_jax.errors import printable

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
h3 {{ font-size: 1rem; margin-top: 1.5rem; }}
.error {{ font-size: 1.35rem; font-weight: 600; }}
.note {{ color: #666; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
td, th {{ text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }}
th {{ font-weight: 400; color: #666; }}
td {{ overflow-wrap: anywhere; }}
.grid td, .grid th {{ border-bottom: 1px solid #ddd; overflow-wrap: normal; }}
.grid .number {{ text-align: right; font-variant-numeric: tabular-nums; }}
.set {{ font-weight: 600; }}
svg {{ max-width: 100%; height: auto; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def escape(text: str) -> str:
    """Text as HTML, without control characters."""
    return html.escape(printable(text))


def page(title: str, *parts: str) -> str:
    """A page with a title and HTML parts."""
    return _PAGE.format(title=escape(title), body="\n".join(parts))


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, style: str | None = None) -> str:
    """A paragraph; ``style`` is "error" for the main figure, or "note"."""
    mark = f' class="{style}"' if style else ""
    return f"<p{mark}>{escape(text)}</p>"


def facts(values: Mapping[str, Any], bold: Collection[str] = ()) -> str:
    """A table of names and values, with those named in ``bold`` in bold."""
    rows = []
    for name, value in values.items():
        mark = ' class="set"' if name in bold else ""
        cells = f"<th>{escape(name)}</th><td{mark}>{escape(str(value))}</td>"
        rows.append(f"<tr>{cells}</tr>")
    return "\n".join(["<table>", *rows, "</table>"])


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a head; cells that begin with a digit are right-aligned."""

    def cell(text: str) -> str:
        mark = ' class="number"' if text[:1].isdigit() else ""
        return f"<td{mark}>{escape(text)}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows]
    start, end = '<div class="wide"><table class="grid">', "</table></div>"
    return "\n".join([start, f"<tr>{head}</tr>", *body, end])


def svg(figure: Any) -> str:
    """A matplotlib figure as a part for ``page``."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
