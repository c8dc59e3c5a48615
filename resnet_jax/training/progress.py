"""The terminal output of a run: what it will do, a progress line and messages."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

from resnet_jax.analysis.complexity import count_parameters
from resnet_jax.config.schema import changed_fields
from resnet_jax.console import describe_seconds, print_facts, say
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
    """The progress line of a run: live in a terminal, plain lines elsewhere.

    It names what the run does from its first second on, with a running clock.
    """

    def __init__(self, console: rich.console.Console):
        self._console = console
        self._phases: list[tuple[str, float]] = []
        self._steps = 0
        self._began: tuple[float, int] | None = None
        self._live = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._task = self._live.add_task("", total=None)

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

    def phase(self, name: str) -> None:
        """Starts a part of the start, such as ``compiling``."""
        self._phases.append((name, time.perf_counter()))
        self._live.update(self._task, description=name)
        if not self._console.is_terminal:
            self.message(f"{name} ...")

    def start(self, step: int, steps: int) -> None:
        """Ends the start, once the first step was made; later calls do nothing."""
        if self._began is not None:
            return
        self._steps, self._began = steps, (time.perf_counter(), step)
        self._live.update(self._task, total=steps, completed=step)
        names, times = zip(*self._phases, strict=True)
        ends = (*times[1:], self._began[0])
        parts = [f"{n} {e - t:.1f}" for n, t, e in zip(names, times, ends, strict=True)]
        total = self._began[0] - times[0]
        self.message(f"first step after {total:.1f} s ({', '.join(parts)})")

    def show(self, row: dict[str, Any]) -> None:
        """Shows a row of metrics.jsonl."""
        line = self._line(row)
        self._live.update(self._task, completed=row["step"], description=line)
        if (
            any(name.startswith("test_") for name in row)
            or not self._console.is_terminal
        ):
            self.message(line)

    def _line(self, row: dict[str, Any]) -> str:
        parts = [
            f"step {row['step']}/{self._steps}",
            f"epoch {row['epoch']:.2f}",
            f"loss {row['train_loss']:.4f}",
        ]
        if "train_error" in row:
            parts.append(f"error {100 * row['train_error']:.2f} %")
        if "images_per_second" in row:
            parts.append(f"{row['images_per_second']:,.0f} images/s")
            parts.append(f"waiting {100 * row['input_wait']:.1f} %")
        parts += [
            f"{name} error {100 * row[f'{name}_error']:.2f} %"
            for name in ("holdout", "test")
            if f"{name}_error" in row
        ]
        if "test_map_area" in row:
            parts.append(f"test mAP {100 * row['test_map_area']:.2f} %")
        began, first = self._began or (0.0, row["step"])
        done, left = row["step"] - first, self._steps - row["step"]
        if done > 0 and left:
            seconds = (time.perf_counter() - began) / done * left
            parts.append(f"{describe_seconds(seconds)} left")
        return " · ".join(parts)


def print_start(
    console: rich.console.Console, learner: Learner, dataset: Dataset, config_file: Path
) -> None:
    """Prints what will run, and the config fields that differ from their defaults."""
    config, derived, mesh = learner.config, learner.derived, learner.mesh
    splits = [s for s in (dataset.train, dataset.holdout, dataset.test) if s]
    counts = ", ".join(f"{len(split):,} {split.name}" for split in splits)
    shape = "x".join(map(str, dataset.image_shape))
    parameters = count_parameters(learner.abstract_state().params)
    changed = [f"{name}={value}" for name, value in changed_fields(config).items()]
    facts = {
        "model": f"{config.model.name}, {parameters:,} parameters",
        "data": f"{config.data.name}: {counts}; {shape}, {dataset.num_classes} classes",
        "length": f"{derived.steps:,} steps of {derived.global_batch_size:,}, "
        f"{derived.epochs:.4g} epochs",
        "test": f"every {min(derived.evaluate_every, derived.steps):,} steps",
        "save": f"every {min(derived.checkpoint_every, derived.steps):,} steps",
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "config": "\n".join(changed) + f"\nall fields: {config_file}",
    }
    print_facts(console, facts)
    notes = [note for split in splits for note in split.notes]
    for note in dict.fromkeys([*derived.notes(), *notes]):
        say(console, note)
