"""Contenders that take turns in one process, and the table of their times."""

import argparse
import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import peers, record

BATCH_SIZES = {
    "cifar_resnet8": 128,
    "cifar_resnet20": 128,
    "resnet18": 16,
    "resnet34": 16,
    "resnet50": 8,
    "resnet101": 8,
    "resnet152": 8,
}
"""The batch of each net where the command line names none."""

OURS = "resnet_jax"
"""The contender that the others' times are divided by."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation of the step.

    Attributes:
      name: in the table.
      parameters: trainable numbers.
      multiply_adds: of one image's forward pass.
      run: does so many steps and waits for them; goes on from where it was.
      is_finite: whether every loss, or the last one, was a finite number.
    """

    name: str
    parameters: int
    multiply_adds: int
    run: Callable[[int], None]
    is_finite: Callable[[], bool]


def torch_version() -> dict[str, Any]:
    """Torch's version and threads, for the record; None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return {"torch": None, "torch_threads": None}
    import torch

    return {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}


def measure(
    contenders: Sequence[Contender], rounds: int, steps: int
) -> dict[str, list[float]]:
    """Milliseconds a step of every round by the contender's name."""
    for contender in contenders:
        # The first step compiles; the second finds all caches and pools made.
        contender.run(2)
    milliseconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for _ in range(rounds):
        for contender in contenders:
            contender.run(1)
            start = time.perf_counter()
            contender.run(steps)
            seconds = time.perf_counter() - start
            milliseconds[contender.name].append(1000 * seconds / steps)
    return milliseconds


def summarize(
    contenders: Sequence[Contender],
    milliseconds: dict[str, list[float]],
    batch_size: int,
) -> list[dict[str, Any]]:
    """A row for each contender.

    ``time_ratio`` is its time over ours: the median of the rounds' ratios, each of two
    turns that follow each other, so that a slow drift of the machine falls out.
    """
    rows = []
    for contender in contenders:
        times = milliseconds[contender.name]
        median = statistics.median(times)
        pairs = zip(times, milliseconds[OURS], strict=True)
        rows.append(
            {
                "name": contender.name,
                "status": "measured" if contender.is_finite() else "loss not finite",
                "parameters": contender.parameters,
                "multiply_adds": contender.multiply_adds,
                "milliseconds": median,
                "milliseconds_min": min(times),
                "milliseconds_max": max(times),
                "images_per_second": 1000 * batch_size / median,
                "time_ratio": statistics.median(
                    theirs / ours for theirs, ours in pairs
                ),
                "milliseconds_of_rounds": times,
            }
        )
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a line a contender."""
    print(
        f"{'contender':<20}{'parameters':>12}{'M mult-adds':>13}"
        f"{'ms/step':>10}  {'(min .. max)':<22}{'images/s':>10}{'time/ours':>11}"
    )
    for row in rows:
        if row["status"] != "measured":
            print(f"{row['name']:<20}{row['status']:>12}")
            continue
        spread = f"({row['milliseconds_min']:.1f} .. {row['milliseconds_max']:.1f})"
        print(
            f"{row['name']:<20}{row['parameters']:>12,}"
            f"{row['multiply_adds'] / 1e6:>13,.1f}{row['milliseconds']:>10.1f}  "
            f"{spread:<22}{row['images_per_second']:>10,.1f}{row['time_ratio']:>11.3f}"
        )


def add_options(parser: argparse.ArgumentParser, model: str, steps: int) -> None:
    """Adds what all contests take: the net, the batch, rounds, steps and the result.

    Args:
      parser: of the script.
      model: the default net.
      steps: the default timed steps a round.
    """
    parser.add_argument("--model", default=model, choices=peers.LAYOUTS)
    parser.add_argument(
        "--batch", type=record.positive, metavar="N", help=f"default: {BATCH_SIZES}"
    )
    parser.add_argument(
        "--rounds", type=record.positive, default=9, metavar="N", help="default: 9"
    )
    parser.add_argument(
        "--steps",
        type=record.positive,
        default=steps,
        metavar="N",
        help=f"timed steps a round and contender (default: {steps})",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result here")


def hold(
    content: dict[str, Any],
    options: argparse.Namespace,
    what: str,
    dtype: str,
    contenders: Sequence[Contender],
    absent: Sequence[dict[str, Any]],
) -> None:
    """Measures, prints the table and writes the JSON.

    Args:
      content: the record's circumstances, taken before the contenders were made.
      options: of ``add_options``, with ``batch`` set.
      what: is measured, for the table's head.
      dtype: of the convolutions.
      contenders: ours first.
      absent: rows of those that cannot take part.
    """
    milliseconds = measure(contenders, options.rounds, options.steps)
    rows = [*summarize(contenders, milliseconds, options.batch), *absent]
    environment = content["environment"] | torch_version()
    size = peers.LAYOUTS[options.model].image_size
    print(
        f"{options.model}, batch {options.batch}, {size} px, {dtype}; "
        f"{environment['devices']}, {environment['cpu']}, "
        f"{environment['cpu_cores']} cores; torch threads: "
        f"{environment['torch_threads']}\n"
        f"{what}, medians of {options.rounds} rounds of {options.steps}"
    )
    print_table(rows)
    result = {
        "environment": environment,
        "model": options.model,
        "batch_size": options.batch,
        "image_size": size,
        "dtype": dtype,
        "rounds": options.rounds,
        "steps_a_round": options.steps,
        "contenders": rows,
    }
    record.write(options.json, content | result)
