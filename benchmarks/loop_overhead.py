"""What the training loop costs beside its jitted step.

    python -m benchmarks.loop_overhead --json FILE

Compares images a second of ``resnet_jax.train`` with those of the bare step in one
process. The default is the hardest case, the shortest step there is: ResNet-20 on the
8x8 digits, batches of 128, a row of metrics every 10 steps. Any config may be given
that counts in steps, and any field be overridden as in ``resnet-jax train``.

What makes the two comparable:

- Both run the same program (the jitted step of the same config, augmentation included)
  on the same resident data set. The loop draws the order, places a batch of indices
  for every step, writes rows to metrics.jsonl and TensorBoard and prints them. The bare
  step is called on one fixed batch of indices that already lies on the device.
- Both are timed in windows of equally many steps. A bare window waits for the device
  once, at its end; the loop waits at every row, and that is part of its cost.
- The loop's time is the wall clock between rows of metrics.jsonl a window apart
  (``seconds``), so that it holds the writing of all rows in between. It does not rest
  on the loop's own ``images_per_second``, which leaves the writing out; that is
  recorded beside it.
- Left out: the first window of a run, in which the step compiles, and its last row,
  with the evaluation and the checkpoint. There is none of either before.
- A round is half of the bare windows, a whole run of the loop, and the other half, so
  that a steady drift of the machine's speed falls on both alike. Its ratio is that of
  the windows' medians; the result is the median of the rounds' ratios.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console

from benchmarks import record
from resnet_jax import UserError, load_config, train
from resnet_jax.cli.overrides import parse_overrides
from resnet_jax.config import Config
from resnet_jax.training.setup import prepare
from resnet_jax.workdir import Workdir

DIGITS = Path(__file__).parent.parent / "configs" / "digits.py"
TARGET = 0.95


class BareStep:
    """The jitted step of a config on one fixed batch."""

    def __init__(self, config: Config):
        """Opens the data and compiles the step.

        Raises:
          UserError: the data set is not resident.
        """
        setup = prepare(config)
        feed = setup.feed(setup.dataset.train)
        if feed.resident is None:
            raise UserError(
                "the data set is streamed: its bare step would not read its images "
                "as the loop's does; set data.resident_mib so that it is resident"
            )
        size = config.training.global_batch_size
        self._resident = feed.resident
        self._batch = next(feed.training_batches(0, size, config.seed))
        self._step = setup.train_step()
        self._state = setup.fresh_state()
        self.seconds(2)

    def seconds(self, steps: int) -> float:
        """Does so many steps, waits for the last and returns how long that took."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state = self._step(self._state, self._resident, self._batch)
        jax.block_until_ready(self._state)
        return time.perf_counter() - start


def loop_seconds(
    config: Config, window: int, windows: int
) -> tuple[list[float], list[float]]:
    """Runs the whole loop in a new workdir.

    Args:
      config: of ``(windows + 1) * window`` steps and a few more.
      window: steps between two readings of the clock.
      windows: how many are read, after the first, which compiles.

    Returns:
      The wall-clock seconds of each window, and the rows' own images a second.
    """
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "output.txt").open("w") as output:
            train(config, Path(folder) / "run", rich.console.Console(file=output))
        rows = Workdir(Path(folder) / "run").read_rows()
    clock = {row["step"]: row["seconds"] for row in rows}
    marks = [clock[window * index] for index in range(1, windows + 2)]
    own = [
        row["images_per_second"]
        for row in rows
        if window < row["step"] <= (windows + 1) * window
    ]
    return [end - start for start, end in itertools.pairwise(marks)], own


def measure_round(
    bare: BareStep, config: Config, window: int, windows: int
) -> dict[str, Any]:
    """Images a second of the loop and of the bare step, before and after it."""
    images = window * config.training.global_batch_size
    before = windows // 2
    bare_seconds = _bare_windows(bare, window, before)
    seconds, own = loop_seconds(config, window, windows)
    bare_seconds += _bare_windows(bare, window, windows - before)
    loop_speed = images / statistics.median(seconds)
    bare_speed = images / statistics.median(bare_seconds)
    return {
        "ratio": loop_speed / bare_speed,
        "loop_images_per_second": loop_speed,
        "bare_images_per_second": bare_speed,
        "loop_own_images_per_second": statistics.median(own),
        "loop_window_seconds": seconds,
        "bare_window_seconds": bare_seconds,
    }


def _bare_windows(bare: BareStep, window: int, windows: int) -> list[float]:
    # What ran before has filled the caches with its own data.
    bare.seconds(min(window, 10))
    return [bare.seconds(window) for _ in range(windows)]


def measured_config(
    spec: str, overrides: dict[str, str], window: int, windows: int
) -> Config:
    """The config of a run that evaluates and saves after its last window only.

    Raises:
      UserError: a fault in the config, or rows that do not fall on the windows' ends.
    """
    config = load_config(spec, overrides)
    every = config.training.log_every_steps
    if window % every:
        raise UserError(
            f"--window {window} is not a multiple of "
            f"training.log_every_steps={every}: no row would end it"
        )
    steps = (windows + 1) * window + every
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, steps=steps, epochs=None),
        evaluation=dataclasses.replace(config.evaluation, every_steps=steps),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=steps),
    )


def main(arguments: Sequence[str]) -> None:
    """Measures, prints a line a round and writes the JSON."""
    options, rest = _parse(arguments)
    content = record.circumstances("loop_overhead", arguments)
    config = measured_config(
        options.config, parse_overrides(rest), options.window, options.windows
    )
    batch, every = config.training.global_batch_size, config.training.log_every_steps
    print(
        f"{config.model.name} on {config.data.name}, batch {batch}, a row every "
        f"{every} steps; {content['environment']['devices']}, "
        f"{content['environment']['cpu']}, "
        f"{content['environment']['cpu_cores']} cores\n"
        f"images a second, medians of {options.windows} windows of "
        f"{options.window} steps"
    )
    bare = BareStep(config)
    rounds = []
    for number in range(1, options.rounds + 1):
        figures = measure_round(bare, config, options.window, options.windows)
        rounds.append(figures)
        print(
            f"round {number}: loop {figures['loop_images_per_second']:,.0f}, "
            f"bare step {figures['bare_images_per_second']:,.0f}, "
            f"ratio {100 * figures['ratio']:.1f} %"
        )
    ratio = statistics.median(figures["ratio"] for figures in rounds)
    print(
        f"the loop has {100 * ratio:.1f} % of the bare step's speed "
        f"(median of {len(rounds)} rounds; the target is {100 * TARGET:.0f} %)"
    )
    content |= {
        "model": config.model.name,
        "data": config.data.name,
        "batch_size": batch,
        "log_every_steps": every,
        "steps_a_window": options.window,
        "windows_a_round": options.windows,
        "ratio": ratio,
        "target": TARGET,
        "rounds": rounds,
    }
    record.write(options.json, content)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loop_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        default=str(DIGITS),
        metavar="FILE.py[:ARG]",
        help="default: configs/digits.py",
    )
    parser.add_argument(
        "--window",
        type=record.positive,
        default=100,
        metavar="N",
        help="steps a window, a multiple of training.log_every_steps (default: 100)",
    )
    parser.add_argument(
        "--windows",
        type=record.positive,
        default=6,
        metavar="N",
        help="windows a round (default: 6)",
    )
    parser.add_argument(
        "--rounds", type=record.positive, default=5, metavar="N", help="default: 5"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
