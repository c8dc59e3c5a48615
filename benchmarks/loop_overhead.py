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
- Where a call of the loop's program makes several steps, so does one of the bare step.
- Both are timed in short windows of equally many steps that take turns: where a window
  of the loop ends, with a row, the loop stands still while the bare step has its own.
  A bare window waits for the device once, at its end; the loop waits at every row, and
  that is part of its cost, as is the writing of all its rows.
- The times are wall-clock times of the script's own. What the loop says of its speed
  (``images_per_second``), which leaves the writing out, is recorded beside them.
- Left out: the first window of a run, in which the step compiles, and its last row,
  with the evaluation and the checkpoint. There is none of either before.
- A window's ratio is the mean of the bare ones before and behind it over its own time,
  so that a drift of the machine's speed falls out. The result is the median of the
  ratios of all windows of all rounds, each a whole run, with the interval in which 95 %
  of the medians of resampled ratios lie (bootstrap).
"""

import argparse
import dataclasses
import io
import itertools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console

from benchmarks import record
from resnet_jax import UserError, load_config, train
from resnet_jax.cli.overrides import parse_overrides
from resnet_jax.config import Config
from resnet_jax.data.device_order import Place
from resnet_jax.training.setup import prepare
from resnet_jax.training.stepper import call_length
from resnet_jax.workdir import Workdir

DIGITS = Path(__file__).parent.parent / "configs" / "digits.py"
TARGET = 0.97


class BareStep:
    """The jitted step of a config on fixed batches."""

    def __init__(self, config: Config):
        """Opens the data.

        Raises:
          UserError: the data set is not resident.
        """
        self._setup = setup = prepare(config)
        feed = setup.feed(setup.dataset.train)
        if feed.resident is None:
            raise UserError(
                "the data set is streamed: its bare step would not read its images "
                "as the loop's does; set data.resident_mib so that it is resident"
            )
        size = config.training.global_batch_size
        self._resident = feed.resident
        self._argument: Any = Place(np.uint32(config.seed), np.int32(0), np.int32(0))
        if setup.steps_per_call == 1:
            self._argument = next(feed.training_batches(0, size, config.seed))
        self._programs: dict[int, jax.stages.Wrapped] = {}
        self._state = setup.fresh_state()

    def seconds(self, steps: int) -> float:
        """Does so many steps, waits for the last and returns how long that took."""
        start = time.perf_counter()
        while steps:
            length = call_length(steps, self._setup.steps_per_call)
            self._state = self._program(length)(
                self._state, self._resident, self._argument
            )
            steps -= length
        jax.block_until_ready(self._state)
        return time.perf_counter() - start

    def _program(self, length: int) -> jax.stages.Wrapped:
        if length not in self._programs:
            self._programs[length] = (
                self._setup.train_step()
                if self._setup.steps_per_call == 1
                else self._setup.train_steps(length)
            )
        return self._programs[length]


class TakingTurns(io.StringIO):
    """What the loop prints to; where a row ends a window, the bare step has its turn.

    Attributes:
      loop, bare: seconds of each window; a bare one stands before every window of the
        loop, and one behind the last.
    """

    def __init__(self, bare: BareStep, window: int, windows: int):
        super().__init__()
        self.loop: list[float] = []
        self.bare: list[float] = []
        self._bare_step, self._window, self._windows = bare, window, windows
        self._began = 0.0

    def write(self, text: str) -> int:
        """Takes the time where ``text`` is the row of a window's last step."""
        now = time.perf_counter()
        row = re.match(r"step (\d+)/", text)
        # The run goes on for another row, which may end a window that is not read.
        more = len(self.bare) <= self._windows
        if more and row and int(row[1]) == self._window * (len(self.bare) + 1):
            self._turn(now)
        return super().write(text)

    def _turn(self, now: float) -> None:
        if self.bare:
            self.loop.append(now - self._began)
        self.bare.append(self._bare_step.seconds(self._window))
        self._began = time.perf_counter()


def measure_round(
    bare: BareStep, config: Config, window: int, windows: int
) -> dict[str, Any]:
    """A whole run of the loop in a new workdir, in turns with the bare step.

    Args:
      bare: the step of ``config``.
      config: see ``measured_config``.
      window: steps between two readings of the clock.
      windows: how many are read, after the first, which compiles.
    """
    # Compiles, and makes all caches and pools.
    bare.seconds(window)
    turns = TakingTurns(bare, window, windows)
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", rich.console.Console(file=turns, width=200))
        rows = Workdir(Path(folder) / "run").read_rows()
    own = [
        row["images_per_second"]
        for row in rows
        if window < row["step"] <= (windows + 1) * window and "images_per_second" in row
    ]
    images = window * config.training.global_batch_size
    return {
        "ratios": ratios(turns.loop, turns.bare),
        "loop_images_per_second": images / statistics.median(turns.loop),
        "bare_images_per_second": images / statistics.median(turns.bare),
        "loop_own_images_per_second": statistics.median(own),
        "loop_window_seconds": turns.loop,
        "bare_window_seconds": turns.bare,
    }


def ratios(loop: Sequence[float], bare: Sequence[float]) -> list[float]:
    """Each loop window's speed over the bare step's before and behind it.

    Args:
      loop: seconds of n windows.
      bare: seconds of the n + 1 windows around them.
    """
    around = itertools.pairwise(bare)
    return [
        (before + behind) / 2 / own
        for own, (before, behind) in zip(loop, around, strict=True)
    ]


def median_interval(
    values: Sequence[float], samples: int = 10_000
) -> tuple[float, float]:
    """Where the middle 95 % of the medians of resampled values lie (bootstrap)."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.asarray(values), (samples, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


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
            f"bare step {figures['bare_images_per_second']:,.0f}, median of ratios "
            f"{100 * statistics.median(figures['ratios']):.1f} %"
        )
    every_ratio = [ratio for figures in rounds for ratio in figures["ratios"]]
    ratio, (low, high) = statistics.median(every_ratio), median_interval(every_ratio)
    print(
        f"the loop has {100 * ratio:.1f} % of the bare step's speed, 95 % interval "
        f"{100 * low:.1f} to {100 * high:.1f} % (median of {len(every_ratio)} windows; "
        f"the target is {100 * TARGET:.0f} %)"
    )
    content |= {
        "model": config.model.name,
        "data": config.data.name,
        "batch_size": batch,
        "log_every_steps": every,
        "steps_a_window": options.window,
        "windows_a_round": options.windows,
        "ratio": ratio,
        "ratio_interval_95": [low, high],
        "steps_per_call": config.training.steps_per_call,
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
        default=20,
        metavar="N",
        help="steps a window, a multiple of training.log_every_steps (default: 20)",
    )
    parser.add_argument(
        "--windows",
        type=record.positive,
        default=60,
        metavar="N",
        help="windows of the loop a round (default: 60)",
    )
    parser.add_argument(
        "--rounds", type=record.positive, default=3, metavar="N", help="default: 3"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
