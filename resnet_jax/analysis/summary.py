"""What a net is, stage by stage: shapes, sizes, costs and receptive fields.

Everything is read off the traced program; nothing is computed on data.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any

import rich.box
import rich.console
import rich.table
from flax import linen as nn

from resnet_jax.analysis.complexity import (
    Path,
    count_parameters,
    multiply_adds_by_module,
    trace,
)
from resnet_jax.analysis.receptive_field import Output, View, module_outputs
from resnet_jax.errors import UserError
from resnet_jax.models import catalog_entry, create_model, shortcuts
from resnet_jax.models.catalog import CATALOG, FAMILIES


@dataclasses.dataclass(frozen=True)
class Row:
    """A module of a net.

    The receptive field is that of the module's output in the image: the smallest
    rectangle that holds every pixel on which one position depends, as if there were
    pixels beyond the border too. Of several outputs the last is meant: of a stem, the
    pooled map.

    Attributes:
      name: its place in the net: "stage1" or "stage1/block2"; "other" is what belongs
        to none of the net's modules.
      output_shape: (h, w, c) of a map, (c,) of features; None if it returns no array.
      parameters: its trainable numbers.
      multiply_adds: of one image, as ``count_multiply_adds`` counts.
      receptive_field: height and width in pixels; None on an axis along which every
        position depends on the whole image.
      stride: pixels between neighbours on the output; None on such an axis.
      first_pixel: row and column at which the field of position (0, 0) begins,
        negative beyond the border; None on such an axis.
      global_context: whether every position depends, besides, on pixels outside its
        field, through something that was reduced over the map: a gate of
        squeeze-and-excitation, or statistics of the image.
      repeats: how often a loop runs it; above 1 for the blocks of a scanned stage.
    """

    name: str
    output_shape: tuple[int, ...] | None
    parameters: int
    multiply_adds: int
    receptive_field: tuple[int | None, int | None]
    stride: tuple[float | None, float | None]
    first_pixel: tuple[int | None, int | None]
    global_context: bool
    repeats: int

    @property
    def is_top_level(self) -> bool:
        """Whether it is one of the rows that add up to the net."""
        return "/" not in self.name


@dataclasses.dataclass(frozen=True)
class Summary:
    """A named net's rows.

    Attributes:
      name: in the catalog.
      options: those of ``create_model`` that were given.
      source: where the net is defined.
      image_shape: (h, w, channels).
      rows: of ``summarize``.
    """

    name: str
    options: dict[str, Any]
    source: str
    image_shape: tuple[int, int, int]
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Those of the whole net."""
        return sum(row.parameters for row in self.rows if row.is_top_level)

    @property
    def multiply_adds(self) -> int:
        """Those of the whole net."""
        return sum(row.multiply_adds for row in self.rows if row.is_top_level)


def summarize(
    model: nn.Module, image_shape: tuple[int, int, int], depth: int = 1
) -> list[Row]:
    """The rows of a net, in the order in which its modules are called.

    Modules without parameters and multiply-adds, such as dropout, have no row.

    Computes shapes alone, so that the largest nets take seconds. The receptive field
    is followed through the operations that nets are made of; a result of any other
    operation counts as dependent on the whole image.

    Args:
      model: called as ``model(images, train=False)``.
      image_shape: (h, w, channels).
      depth: 1 for the net's modules (stem, stages, head), whose parameters and
        multiply-adds add up to the net's; 2 for those inside them too, and so on.

    Raises:
      ValueError: a depth below 1, or a loop whose length is not known.
    """
    if depth < 1:
        raise ValueError(f"the depth of a summary is at least 1, not {depth}")
    program = trace(model, image_shape)
    costs = multiply_adds_by_module(program)
    params = program.variables.get("params", {})
    outputs = module_outputs(program, image_shape)
    rows = []
    # A module that only holds others is never called, but has a row.
    levels = (path[:n] for path in program.paths for n in range(1, len(path) + 1))
    for path in dict.fromkeys(levels):
        if len(path) > depth:
            continue
        cost = sum(n for inner, n in costs.items() if inner[: len(path)] == path)
        size = _parameters(params, path)
        if cost or size:
            output = outputs.get(path, _NO_OUTPUT)
            rows.append(_row(path, output, size, cost, image_shape))
    top = [row for row in rows if row.is_top_level]
    parameters = count_parameters(params) - sum(row.parameters for row in top)
    cost = costs.total() - sum(row.multiply_adds for row in top)
    if parameters or cost:
        rows.append(_row(("other",), _NO_OUTPUT, parameters, cost, image_shape))
    return rows


def summarize_named(
    name: str, *, image_size: int | None = None, depth: int = 1, **options: Any
) -> Summary:
    """The summary of a net of the catalog.

    Args:
      name: one of ``list_models()``.
      image_size: side of the square images; the net's own by default.
      depth: see ``summarize``.
      **options: of ``create_model``.

    Raises:
      UserError: an unknown name or option, or images too small for the net.
    """
    entry = catalog_entry(name)
    model = create_model(name, **options)
    side = entry.image_size if image_size is None else image_size
    if side < 1:
        raise UserError(f"the image size must be at least 1, not {side}")
    too_small = UserError(
        f"images of {side} x {side} pixels are too small for {name}, which was "
        f"published for {entry.image_size} x {entry.image_size}"
    )
    shape = (side, side, entry.channels)
    try:
        rows = summarize(model, shape, depth)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        # A map without pixels: what fails first differs from net to net.
        if side < entry.image_size:
            raise too_small from error
        raise
    if any(0 in row.output_shape for row in rows if row.output_shape):
        raise too_small
    return Summary(name, options, entry.source, shape, tuple(rows))


def print_catalog(console: rich.console.Console | None = None) -> None:
    """Prints a line for every named net: images, parameters, multiply-adds, source.

    Args:
      console: where to print; standard output by default.
    """
    console = console or rich.console.Console()
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in ("image", "params", "mul-adds"):
        table.add_column(heading, justify="right")
    table.add_column("source")
    for name, entry in CATALOG.items():
        costs = (_short(entry.parameters or 0), _short(entry.multiply_adds or 0))
        table.add_row(name, str(entry.image_size), *costs, entry.source)
    for name, meaning in FAMILIES.items():
        table.add_row(name, "32", "", "", meaning)
    console.print(table)


def print_summaries(
    names: Sequence[str],
    *,
    compare: bool = False,
    image_size: int | None = None,
    depth: int = 1,
    shortcut: str | None = None,
    json_path: str | None = None,
    console: rich.console.Console | None = None,
    **options: Any,
) -> list[Summary]:
    """Prints the tables of nets of the catalog.

    Args:
      names: of the nets.
      compare: print two nets side by side.
      image_size: see ``summarize_named``.
      depth: see ``summarize``.
      shortcut: in place of the nets' own; plain nets, and those without residual
        blocks, stay as they are.
      json_path: where to write the figures, if anywhere.
      console: where to print; standard output by default.
      **options: of ``create_model``, for every net; those that are None are left out.

    Returns:
      The summaries, in the order of the names.

    Raises:
      UserError: no or unknown names, a comparison of other than two nets, an unknown
        option, a shortcut for nets that have none, or images too small.
    """
    if compare and len(names) != 2:
        raise UserError(f"--compare sets two nets side by side, not {len(names)}")
    if not names:
        raise UserError("name a net, for example: resnet-jax summary resnet50")
    console = console or rich.console.Console()
    options = {key: value for key, value in options.items() if value is not None}
    with_shortcuts = [name for name in names if _has_shortcuts(name)]
    if shortcut is not None and not with_shortcuts:
        raise UserError(f"{' and '.join(names)}: a net without shortcuts takes none")
    summaries = []
    for name in names:
        own = dict(options)
        if shortcut is not None and name in with_shortcuts:
            own["shortcut"] = shortcut
        summaries.append(
            summarize_named(name, image_size=image_size, depth=depth, **own)
        )
    tables = [summaries] if compare else [[summary] for summary in summaries]
    for index, shown in enumerate(tables):
        if index:
            console.print()
        console.print(render(*shown))
    if json_path is not None:
        result: dict[str, Any] = {"nets": [_as_json(summary) for summary in summaries]}
        if compare:
            result["ratio"] = dict(zip(_COSTS, _ratios(*summaries), strict=True))
        try:
            FilePath(json_path).write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"{json_path} cannot be written ({error.strerror})"
            ) from error
    return summaries


def _has_shortcuts(name):
    shortcut = getattr(create_model(name), "shortcut", None)
    return shortcut is not None and not isinstance(shortcut, shortcuts.NoShortcut)


# Tables


_COSTS = ("parameters", "multiply_adds")
_NAME_WIDTH = 11


def render(summary: Summary, other: Summary | None = None) -> rich.table.Table:
    """A table of one net, or of two side by side with the ratio of their totals.

    Rows of two nets that have the same name stand on the same line. Print it with a
    rich console; a notebook shows it as it is.
    """
    return _render_one(summary) if other is None else _render_two(summary, other)


def _render_one(summary):
    table = _table([summary], _caption(summary.rows))
    table.add_column("", footer="total")
    for header, footer in (
        ("output", ""),
        ("stride", ""),
        ("field", ""),
        ("parameters", f"{summary.parameters:,}"),
        ("multiply-adds", f"{summary.multiply_adds:,}"),
    ):
        table.add_column(header, footer=footer, justify="right", overflow="fold")
    for row in summary.rows:
        table.add_row(
            _indented(row),
            _shape(row),
            _sides(row.stride),
            _field(row, " + "),
            f"{row.parameters:,}",
            f"{row.multiply_adds:,}",
        )
    return table


def _render_two(first, second):
    both = (first, second)
    ratios = [f"{ratio:.4g}" for ratio in _ratios(first, second)]
    table = _table(
        both,
        f"{first.name} has {ratios[0]} times the parameters of {second.name} and "
        f"{ratios[1]} times its multiply-adds\n"
        + _caption([*first.rows, *second.rows]),
    )
    table.add_column("", footer="total", no_wrap=True)
    for summary in both:
        table.add_column("")  # a wider gap
        for header, footer in (
            (f"{_broken(summary.name)}\noutput", ""),
            ("field", ""),
            ("params", _short(summary.parameters)),
            ("mul-\nadds", _short(summary.multiply_adds)),
        ):
            table.add_column(
                header,
                footer=footer,
                justify="right",
                vertical="bottom",
                overflow="fold",
            )
    by_name = [{row.name: row for row in summary.rows} for summary in both]
    for name in _aligned(list(by_name[0]), list(by_name[1])):
        found = [rows.get(name) for rows in by_name]
        cells = [_indented(next(row for row in found if row))]
        for row in found:
            cells += ["", *_short_cells(row)] if row else [""] * 5
        table.add_row(*cells)
    return table


def _table(summaries, caption):
    return rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        title="\n".join(_title(summary) for summary in summaries),
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        show_footer=True,
        pad_edge=False,
        padding=(0, 0) if len(summaries) > 1 else (0, 1),
    )


def _short_cells(row):
    costs = (_short(row.parameters), _short(row.multiply_adds))
    return [_shape(row), _field(row, "+"), *costs]


def _title(summary):
    options = "".join(
        f", {key.replace('_', ' ')} {value}" for key, value in summary.options.items()
    )
    size = "x".join(map(str, summary.image_shape))
    return f"{summary.name}{options}; images {size}; {summary.source}"


def _broken(name):
    """A long name in lines that are as narrow as the column below it."""
    lines = [""]
    for part in re.findall("[^_]*_|[^_]+", name):
        if lines[-1] and len(lines[-1] + part) > _NAME_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _caption(rows: Iterable[Row]) -> str:
    gated = any(row.global_context for row in rows)
    return "field: the receptive field, in pixels; all: the whole image" + (
        "\n+ all: besides, the whole image through a mean over the map" if gated else ""
    )


def _ratios(first, second):
    """Of the totals, in the order of ``_COSTS``."""
    return [getattr(first, cost) / getattr(second, cost) for cost in _COSTS]


def _aligned(first: list[str], second: list[str], parent: str = "") -> Iterator[str]:
    """The names of both below a parent, each followed by those below itself.

    Those that are only in ``second`` stand before the next that is in both.
    """
    merged, other = (
        [name for name in names if name.rpartition("/")[0] == parent]
        for names in (first, second)
    )
    place = len(merged)
    for name in reversed(other):
        if name in merged:
            place = merged.index(name)
        else:
            merged.insert(place, name)
    for name in merged:
        yield name
        yield from _aligned(first, second, name)


def _indented(row):
    parts = row.name.split("/")
    times = f" x{row.repeats}" if row.repeats > 1 else ""
    return "  " * (len(parts) - 1) + parts[-1] + times


def _shape(row):
    return "" if row.output_shape is None else "x".join(map(str, row.output_shape))


def _field(row, plus):
    if row.output_shape is None:
        return ""
    text = _sides(row.receptive_field, none="all")
    return f"{text}{plus}all" if row.global_context else text


def _sides(sides, none=""):
    height, width = (none if side is None else f"{side:,}" for side in sides)
    return height if height == width else f"{height}x{width}"


def _short(count):
    """Three digits and a unit: 9.54k, 1.23M, 118M."""
    if count < 1000:
        return str(count)
    digits, exponent = f"{count:.2e}".split("e")
    thousands, tens = divmod(int(exponent), 3)
    return f"{float(digits) * 10**tens:.{2 - tens}f}{' kMGT'[thousands]}"


def _as_json(summary):
    rows = [dataclasses.asdict(row) for row in summary.rows]
    totals = {cost: getattr(summary, cost) for cost in _COSTS}
    return dataclasses.asdict(summary) | {"rows": rows, "total": totals}


# Rows


_NO_OUTPUT = Output(None, None, 1)


def _parameters(params: Any, path: Path) -> int:
    for key in path:
        if key not in params:
            return 0
        params = params[key]
    return count_parameters(params)


def _row(path, output, parameters, multiply_adds, image_shape):
    views = output.reach or (View(), View())
    rows, columns = (view.window for view in views)
    height, width = image_shape[:2]
    return Row(
        name="/".join(path),
        output_shape=output.shape,
        parameters=parameters,
        multiply_adds=multiply_adds,
        receptive_field=(_field_size(views[0], height), _field_size(views[1], width)),
        stride=(_stride(rows), _stride(columns)),
        first_pixel=(_first_pixel(rows), _first_pixel(columns)),
        global_context=any(view.window and view.common for view in views),
        repeats=output.repeats,
    )


def _field_size(view, side):
    """The pixels of the field along an axis of ``side`` pixels; None: all of them."""
    span = view.window.span(1) if view.window else view.common
    if span is None:
        return 0
    if view.window is None and span[0] <= 0 and span[1] >= side - 1:
        return None
    return math.floor(span[1]) - math.ceil(span[0]) + 1


def _stride(window):
    """An int, but of a map that was enlarged."""
    if window is None:
        return None
    stride = window.stride
    return stride.numerator if stride.denominator == 1 else float(stride)


def _first_pixel(window):
    return math.ceil(window.low) if window else None
