"""Nets stage by stage: shapes, sizes, costs and receptive fields.

All figures come from the traced program; nothing is computed on data.
"""

import dataclasses
import difflib
import json
import textwrap
from collections.abc import Iterator, Sequence
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
from resnet_jax.console import make_console
from resnet_jax.errors import UserError
from resnet_jax.models import catalog_entry, create_model, shortcuts
from resnet_jax.models.catalog import CATALOG, FAMILIES

_NO_OUTPUT = Output(None, None, 1)
_COSTS = ("parameters", "multiply_adds")


@dataclasses.dataclass(frozen=True)
class Row:
    """A module of a net.

    The receptive field is the smallest rectangle of the image with every pixel that one
    position of the module's output depends on, as if the image had no border. For a
    module with several outputs it is the last one's: for a stem, the pooled map's. Its
    values are None along an axis on which every position depends on the whole image.

    Attributes:
      name: path in the net, "stage1" or "stage1/block2"; "other" for what belongs to
        none of the net's modules.
      output_shape: (h, w, c) of a map, (c,) of features; None for no array.
      parameters: trainable numbers.
      multiply_adds: of one image, as ``count_multiply_adds`` counts.
      receptive_field: height and width in pixels.
      stride: pixels between neighbours on the output.
      first_pixel: row and column where the field of position (0, 0) begins, negative
        beyond the border.
      global_context: whether every position also depends on the whole image, as after
        squeeze-and-excitation.
      repeats: number of times a loop runs it; above 1 in a scanned stage.
    """

    name: str
    output_shape: tuple[int, ...] | None
    parameters: int
    multiply_adds: int
    receptive_field: tuple[int | None, int | None]
    stride: tuple[int | None, int | None]
    first_pixel: tuple[int | None, int | None]
    global_context: bool
    repeats: int

    @property
    def is_top_level(self) -> bool:
        """Whether the row is one of those that add up to the net."""
        return "/" not in self.name


@dataclasses.dataclass(frozen=True)
class Summary:
    """The rows of a net of the catalog, made by ``create_model(name, **options)``."""

    name: str
    options: dict[str, Any]
    source: str
    image_shape: tuple[int, int, int]
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Trainable numbers of the net."""
        return sum(row.parameters for row in self.rows if row.is_top_level)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the net for one image."""
        return sum(row.multiply_adds for row in self.rows if row.is_top_level)


def summarize(
    model: nn.Module, image_shape: tuple[int, int, int], depth: int = 1
) -> list[Row]:
    """The rows of a net, in the order of the calls; computes shapes alone.

    Modules without parameters and multiply-adds, such as dropout, have no row.

    Args:
      model: called as ``model(images, train=False)``.
      image_shape: (h, w, channels).
      depth: 1 for the net's modules (stem, stages, head), whose parameters and
        multiply-adds add up to the net's; 2 adds the modules inside them, and so on.

    Raises:
      ValueError: a depth below 1, or a loop of unknown length.
    """
    if depth < 1:
        raise ValueError(f"the depth of a summary is at least 1, not {depth}")
    program = trace(model, image_shape)
    costs = multiply_adds_by_module(program)
    params = program.variables.get("params", {})
    outputs = module_outputs(program)
    rows = []
    # A module that only holds others is never called, but has a row.
    levels = (path[:n] for path in program.paths for n in range(1, len(path) + 1))
    for path in dict.fromkeys(levels):
        cost = sum(n for inner, n in costs.items() if inner[: len(path)] == path)
        size = _parameters(params, path)
        if len(path) <= depth and (cost or size):
            output = outputs.get(path, _NO_OUTPUT)
            rows.append(_row("/".join(path), output, size, cost))
    top = [row for row in rows if row.is_top_level]
    size = count_parameters(params) - sum(row.parameters for row in top)
    cost = costs.total() - sum(row.multiply_adds for row in top)
    if size or cost:
        rows.append(_row("other", _NO_OUTPUT, size, cost))
    return rows


def _row(name: str, output: Output, parameters: int, multiply_adds: int) -> Row:
    views = output.reach or (View(None), View(None))
    windows = [view.window for view in views]
    fields = [w and w.high - w.low + 1 for w in windows]
    return Row(
        name=name,
        output_shape=output.shape,
        parameters=parameters,
        multiply_adds=multiply_adds,
        receptive_field=(fields[0], fields[1]) if output.reach else (0, 0),
        stride=tuple(w and w.stride for w in windows),  # type: ignore[arg-type]
        first_pixel=tuple(w and w.low for w in windows),  # type: ignore[arg-type]
        global_context=any(view.context for view in views),
        repeats=output.repeats,
    )


def _parameters(params: Any, path: Path) -> int:
    for key in path:
        if key not in params:
            return 0
        params = params[key]
    return count_parameters(params)


def summarize_named(
    name: str, *, image_size: int | None = None, depth: int = 1, **options: Any
) -> Summary:
    """The summary of a net of the catalog.

    Args:
      name: one of ``list_models()``.
      image_size: side of the square images; None means the net's own.
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
        # A map without pixels; what fails first depends on the net.
        if side < entry.image_size:
            raise too_small from error
        raise
    if any(0 in row.output_shape for row in rows if row.output_shape):
        raise too_small
    return Summary(name, options, entry.source, shape, tuple(rows))


# Printing


def print_catalog(console: rich.console.Console | None = None) -> None:
    """Prints a line for every named net: images, parameters, multiply-adds, source."""
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
    (console or make_console()).print(table)


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
    """Prints and returns the summaries of nets of the catalog.

    Args:
      names: of the nets.
      compare: print two nets side by side.
      image_size: see ``summarize_named``.
      depth: see ``summarize``.
      shortcut: replaces the nets' own; nets without shortcuts stay as they are.
      json_path: file for the figures.
      console: None means standard output.
      **options: of ``create_model``, for every net; None means the default.

    Raises:
      UserError: no or unknown names, a comparison of other than two nets, an unknown
        option, a shortcut for nets that have none, or images too small.
    """
    if compare and len(names) != 2:
        raise UserError(f"--compare sets two nets side by side, not {len(names)}")
    if not names:
        raise UserError("name a net, for example: resnet-jax summary resnet50")
    options = {key: value for key, value in options.items() if value is not None}
    changed = {name for name in names if shortcut and _has_shortcuts(name)}
    if shortcut is not None and not changed:
        raise UserError(f"{' and '.join(names)}: a net without shortcuts takes none")
    summaries = []
    for name in names:
        own = options | ({"shortcut": shortcut} if name in changed else {})
        summary = summarize_named(name, image_size=image_size, depth=depth, **own)
        summaries.append(summary)
    console = console or make_console()
    for shown in [summaries] if compare else [[summary] for summary in summaries]:
        console.print(render(*shown))
    if json_path is not None:
        _write_json(json_path, summaries, compare)
    return summaries


def _write_json(path: str, summaries: Sequence[Summary], compare: bool) -> None:
    nets = [
        dataclasses.asdict(net)
        | {"total": {cost: getattr(net, cost) for cost in _COSTS}}
        for net in summaries
    ]
    result: dict[str, Any] = {"nets": nets}
    if compare:
        result["ratio"] = dict(zip(_COSTS, _ratios(*summaries), strict=True))
    try:
        FilePath(path).write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error


def _has_shortcuts(name: str) -> bool:
    shortcut = getattr(create_model(name), "shortcut", None)
    return shortcut is not None and not isinstance(shortcut, shortcuts.NoShortcut)


def render(summary: Summary, other: Summary | None = None) -> rich.table.Table:
    """A table of one net, or of two side by side with the ratio of their totals.

    Rows of the same name share a line. A notebook displays the table.
    """
    nets = [summary] if other is None else [summary, other]
    rows = [{row.name: row for row in net.rows} for net in nets]
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        title="\n".join(map(_title, nets)),
        title_justify="left",
        title_style="bold",
        caption=_caption(nets),
        caption_justify="left",
        show_footer=True,
        pad_edge=False,
        padding=(0, 1) if other is None else 0,
    )
    table.add_column("", footer="total", no_wrap=True)
    for net in nets:
        headings = ["output", "stride", "field", "parameters", "multiply-adds"]
        if other is not None:
            # The name in lines as narrow as the column below it.
            lines = textwrap.wrap(net.name.replace("_", "_ "), 11)
            name = "\n".join(lines).replace("_ ", "_")
            headings = ["", f"{name}\noutput", "field", "params", "mul-\nadds"]
        footers = ["", "", "", *_costs(net, short=other is not None)]
        for heading, footer in zip(headings, footers, strict=True):
            table.add_column(
                heading, footer, justify="right", vertical="bottom", overflow="fold"
            )
    for name in _merged(list(rows[0]), list(rows[-1])):
        found = [named.get(name) for named in rows]
        cells = [_indented(next(row for row in found if row))]
        for row in found:
            cells += _cells(row, short=other is not None) if row else [""] * 5
        table.add_row(*cells)
    return table


def _title(summary: Summary) -> str:
    options = "".join(
        f", {key.replace('_', ' ')} {value}" for key, value in summary.options.items()
    )
    size = "x".join(map(str, summary.image_shape))
    return f"{summary.name}{options}; images {size}; {summary.source}"


def _caption(nets: Sequence[Summary]) -> str:
    text = "field: the receptive field, in pixels; all: the whole image"
    if any(row.global_context for net in nets for row in net.rows):
        text += "\n+ all: and the whole image through a mean over the map"
    if len(nets) == 1:
        return text
    parameters, multiply_adds = (f"{ratio:.4g}" for ratio in _ratios(*nets))
    return (
        f"{nets[0].name} has {parameters} times the parameters of {nets[1].name} and "
        f"{multiply_adds} times its multiply-adds\n{text}"
    )


def _ratios(first: Summary, second: Summary) -> list[float]:
    return [getattr(first, cost) / getattr(second, cost) for cost in _COSTS]


def _merged(first: list[str], second: list[str]) -> Iterator[str]:
    """The names of both lists, each once, in an order that keeps both."""
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    for kind, i, j, k, m in matcher.get_opcodes():
        yield from first[i:j]
        yield from () if kind == "equal" else second[k:m]


def _cells(row: Row, short: bool) -> list[str]:
    """A row without its name; short numbers and no stride beside another net."""
    costs = _costs(row, short)
    if short:
        return ["", _shape(row), _field(row, "+"), *costs]
    return [_shape(row), _sides(row.stride), _field(row, " + "), *costs]


def _costs(costs: Row | Summary, short: bool) -> list[str]:
    counts = [getattr(costs, name) for name in _COSTS]
    return [_short(count) if short else f"{count:,}" for count in counts]


def _indented(row: Row) -> str:
    *parents, own = row.name.split("/")
    times = f" x{row.repeats}" if row.repeats > 1 else ""
    return "  " * len(parents) + own + times


def _shape(row: Row) -> str:
    return "" if row.output_shape is None else "x".join(map(str, row.output_shape))


def _field(row: Row, plus: str) -> str:
    if row.output_shape is None:
        return ""
    text = _sides(row.receptive_field, none="all")
    return f"{text}{plus}all" if row.global_context else text


def _sides(sides: tuple[int | None, int | None], none: str = "") -> str:
    height, width = (none if side is None else f"{side:,}" for side in sides)
    return height if height == width else f"{height}x{width}"


def _short(count: int) -> str:
    """Three digits and a unit: 9.54k, 1.23M, 118M."""
    if count < 1000:
        return str(count)
    digits, exponent = f"{count:.2e}".split("e")
    thousands, tens = divmod(int(exponent), 3)
    return f"{float(digits) * 10**tens:.{2 - tens}f}{' kMGT'[thousands]}"
