"""What a person sees of a run: a progress line, messages, tables."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rich.console
import rich.progress
import rich.table

from resnet_jax.config import Config, Derived, flatten


class Throughput:
    """Images a second and the share of time that the loop waits for its input."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a new interval."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self._images = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def count(self, images: int) -> None:
        """Counts images whose step was given to the devices."""
        self._images += images

    def interval(self) -> dict[str, float]:
        """The interval's figures; call when its steps have finished.

        Empty where it has no steps to measure.
        """
        seconds = time.perf_counter() - self._start
        if not self._images:
            return {}
        return {
            "images_per_second": self._images / seconds,
            "input_wait": self._waited / seconds,
        }


class Progress:
    """The progress line of a run: live in a terminal, plain lines elsewhere."""

    def __init__(self, console: rich.console.Console, steps: int):
        self._console = console
        self._steps = steps
        self._began: tuple[float, int] | None = None
        self._live: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live = rich.progress.Progress(
                rich.progress.BarColumn(bar_width=20),
                rich.progress.TextColumn("{task.description}"),
                console=self._console,
                transient=True,
            )
            self._live.start()
            self._task = self._live.add_task("compiling", total=self._steps)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def message(self, text: str) -> None:
        """Prints a line that stays."""
        say(self._console, text)

    @property
    def started(self) -> bool:
        """Whether ``start`` was called."""
        return self._began is not None

    def start(self, step: int) -> None:
        """Takes the time from which the time left is estimated."""
        self._began = (time.perf_counter(), step)

    def show(self, row: dict[str, Any]) -> None:
        """Shows a row of metrics.jsonl."""
        line = self._line(row)
        if self._live is None or self._task is None:
            self.message(line)
            return
        self._live.update(self._task, completed=row["step"], description=line)
        if "test_error" in row:
            self.message(line)

    def _line(self, row: dict[str, Any]) -> str:
        parts = [
            f"step {row['step']}/{self._steps}",
            f"epoch {row['epoch']:.2f}",
            f"loss {row['train_loss']:.4f}",
            f"error {100 * row['train_error']:.2f} %",
        ]
        if "images_per_second" in row:
            parts.append(f"{row['images_per_second']:,.0f} images/s")
            parts.append(f"waiting {100 * row['input_wait']:.1f} %")
        parts += [
            f"{name} error {100 * row[f'{name}_error']:.2f} %"
            for name in ("holdout", "test")
            if f"{name}_error" in row
        ]
        left = self._time_left(row["step"])
        if left is not None and row["step"] < self._steps:
            parts.append(f"{describe_seconds(left)} left")
        return " · ".join(parts)

    def _time_left(self, step: int) -> float | None:
        if self._began is None or step <= self._began[1]:
            return None
        seconds = time.perf_counter() - self._began[0]
        return seconds / (step - self._began[1]) * (self._steps - step)


def say(console: rich.console.Console, text: str) -> None:
    """Prints a line as it is: unwrapped, and without markup in paths."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def describe_seconds(seconds: float) -> str:
    """A duration in words: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def print_config(
    console: rich.console.Console, config: Config, values: dict[str, Any]
) -> None:
    """Prints the resolved config, a line a section, and the derived values."""
    table = rich.table.Table(box=None, show_header=False, padding=(0, 1))
    sections: dict[str, list[str]] = {}
    for name, value in flatten(config).items():
        section, _, key = name.rpartition(".")
        sections.setdefault(section or "run", []).append(f"{key}={value}")
    sections["derived"] = [f"{key}={value}" for key, value in values.items()]
    for section, entries in sections.items():
        table.add_row(section, " ".join(entries))
    console.print(table, highlight=False)


def derived_values(derived: Derived) -> dict[str, str]:
    """The derived values for a person: thousands marked, floats short."""
    values = {
        "training_examples": f"{derived.training_examples:,}",
        "global_batch": f"{derived.global_batch_size:,}",
        "steps": f"{derived.steps:,}",
        "epochs": f"{derived.epochs:.4g}",
        "steps_per_epoch": f"{derived.steps_per_epoch:.6g}",
        "evaluate_every": f"{derived.evaluate_every:,}",
        "checkpoint_every": f"{derived.checkpoint_every:,}",
    }
    if derived.boundaries:
        values["rate_falls_at"] = ",".join(map(str, derived.boundaries))
    if derived.warmup_steps:
        values["warmup_steps"] = f"{derived.warmup_steps:,}"
    return values
