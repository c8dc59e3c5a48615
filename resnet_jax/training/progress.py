"""The terminal output of a run: its config, a progress line and messages."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rich.console
import rich.progress

from resnet_jax.analysis.complexity import count_parameters
from resnet_jax.config import flatten
from resnet_jax.console import describe, describe_seconds, print_facts, say
from resnet_jax.data.dataset import Dataset
from resnet_jax.training.state import Learner


class Throughput:
    """Images per second, and the share of time that the loop waits for input."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts a new interval."""
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
        """Counts the images of a step that was dispatched."""
        self._images += images

    def interval(self) -> dict[str, float]:
        """The figures of an interval whose steps have finished; empty without steps."""
        seconds = time.perf_counter() - self._start
        figures = {"images_per_second": self._images, "input_wait": self._waited}
        return {k: x / seconds for k, x in figures.items()} if self._images else {}


class Progress:
    """The progress line of a run: live in a terminal, plain lines elsewhere."""

    def __init__(self, console: rich.console.Console, steps: int):
        self._console, self._steps = console, steps
        self._created = time.perf_counter()
        self._began: tuple[float, int] | None = None
        self._live = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._task = self._live.add_task("compiling", total=steps)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def message(self, text: str) -> None:
        """Prints a line that stays."""
        say(self._console, text)

    def start(self, step: int) -> None:
        """Starts the clock that estimates the time left, at its first call."""
        if self._began is None:
            self._began = (time.perf_counter(), step)
            seconds = self._began[0] - self._created
            self.message(f"data and compiled step ready in {seconds:.1f} s")

    def show(self, row: dict[str, Any]) -> None:
        """Shows a row of metrics.jsonl."""
        line = self._line(row)
        self._live.update(self._task, completed=row["step"], description=line)
        if "test_error" in row or not self._console.is_terminal:
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
        began, first = self._began or (0.0, row["step"])
        done, left = row["step"] - first, self._steps - row["step"]
        if done > 0 and left:
            seconds = (time.perf_counter() - began) / done * left
            parts.append(f"{describe_seconds(seconds)} left")
        return " · ".join(parts)


def print_start(
    console: rich.console.Console, learner: Learner, dataset: Dataset
) -> None:
    """Prints the config, one line per section, the derived values and the data."""
    config, derived, mesh = learner.config, learner.derived, learner.mesh
    sections: dict[str, list[str]] = {}
    for name, value in flatten(config).items():
        section, _, key = name.rpartition(".")
        sections.setdefault(section or "run", []).append(f"{key}={value}")
    values = dataclasses.asdict(derived) | {
        "parameters": count_parameters(learner.abstract_state().params),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
    }
    sections["derived"] = [f"{key}={describe(x)}" for key, x in values.items() if x]
    print_facts(
        console, {name: " ".join(entries) for name, entries in sections.items()}
    )
    for note in derived.notes():
        say(console, note)
    splits = (dataset.train, dataset.holdout, dataset.test)
    counts = ", ".join(f"{len(split):,} {split.name}" for split in splits if split)
    shape = "x".join(map(str, dataset.image_shape))
    classes = f"{dataset.num_classes} classes"
    say(console, f"{config.data.name}: {counts}; {shape}, {classes}")
    for note in dict.fromkeys(
        note for split in splits if split for note in split.notes
    ):
        say(console, note)
