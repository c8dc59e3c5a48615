"""Printing, for all commands."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import rich.console
import rich.progress
import rich.table
import rich.text

from resnet_jax.errors import printable


def make_console() -> rich.console.Console:
    """Standard output; silent on all but the first process of a run.

    In a notebook it prints plain text, which is one output per cell and can be copied.
    """
    from resnet_jax import distributed

    in_notebook = type(sys.stdout).__module__.startswith("ipykernel.")
    return rich.console.Console(
        quiet=not distributed.is_primary(),
        force_jupyter=False,
        # Notebooks claim to be a terminal, but show no bars or bold text.
        force_terminal=False if in_notebook else None,
    )


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Shows a clock in a terminal, while a command imports libraries."""
    columns = (rich.progress.TimeElapsedColumn(), rich.progress.TextColumn("loading"))
    console = rich.console.Console()
    with rich.progress.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as clock:
        clock.add_task("", total=None)
        yield


def say(console: rich.console.Console, text: str) -> None:
    """Prints a line without wrapping or markup: paths may contain brackets."""
    console.print(printable(text), highlight=False, soft_wrap=True, markup=False)


def print_facts(console: rich.console.Console, facts: Mapping[str, str]) -> None:
    """Prints names and values as two columns."""
    table = rich.table.Table(box=None, show_header=False, padding=(0, 1))
    for name, value in facts.items():
        table.add_row(name, rich.text.Text(printable(value)))
    console.print(table, highlight=False)


def describe(value: Any) -> str:
    """A value as text, with short floats and thousands separators."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def describe_seconds(seconds: float) -> str:
    """A duration in words: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
