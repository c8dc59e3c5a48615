"""Disturbs real runs in every way that real life does, and compares how they end.

    python -m tests.soak --workdir runs/soak --kills 20 --json soak.json
    python -m tests.soak --workdir runs/soak --only kills --seed 1

Each run is a process: cifar_resnet8 on the digits, on one CPU device. After each fault,
the same command must end bit for bit where an undisturbed run ends: all arrays of the
state, and all rows of metrics.jsonl except measured times. --seed determines all
moments and damages. Runs share compiled programs in the folder, or in
JAX_COMPILATION_CACHE_DIR.

A fault that this machine does not allow is reported as skipped. The exit status is 1 if
anything failed. docs/faults.md describes each fault.
"""

import argparse
import concurrent.futures
import copy
import dataclasses
import json
import random
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resnet_jax.environment import environment
from tests.soak import runs
from tests.soak.runs import Failed, Skipped
from tests.soak.scenarios import SCENARIOS, Soak


@dataclasses.dataclass
class Outcome:
    """How a scenario went: ``seen`` has a line for each try that passed."""

    name: str
    status: str
    seconds: float
    seen: list[str]
    reason: str = ""

    def __str__(self) -> str:
        line = f"{self.name:14}{len(self.seen):4} passed{self.seconds:8.0f} s  "
        return line + self.status + (f": {self.reason}" if self.reason else "")


def attempt(name: str, soak: Soak) -> Outcome:
    """Runs a scenario, printing each try; a fault of it never stops the others."""
    start, seen, status, reason = time.monotonic(), [], "passed", ""
    soak = copy.copy(soak)
    # Of its own, so that --only and --jobs draw the same.
    soak.rng = random.Random(f"{soak.seed} {name}")
    try:
        for line in SCENARIOS[name](soak):
            seen.append(runs.without_paths(line, soak.root))
            print(f"  {name}: {seen[-1]}", flush=True)
    except (Failed, Skipped) as error:
        status = type(error).__name__.lower()
        reason = runs.without_paths(str(error), soak.root)
    return Outcome(name, status, time.monotonic() - start, seen, reason)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse(arguments)
    options.workdir.mkdir(parents=True, exist_ok=True)
    if any(options.workdir.iterdir()):
        print(f"soak: error: {options.workdir} is not empty", file=sys.stderr)
        return 1
    soak = Soak(options)
    soak.undisturbed()
    soak.measure()
    soak.make_stopped()
    outcomes = []
    names = options.only or SCENARIOS
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        attempts = [pool.submit(attempt, name, soak) for name in names]
        for ended in concurrent.futures.as_completed(attempts):
            outcomes.append(ended.result())
            print(outcomes[-1], flush=True)
            if options.json:
                write(options, outcomes)
    print("", *outcomes, sep="\n")
    return int(any(outcome.status == "failed" for outcome in outcomes))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, of which the counts are at least 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="an empty folder")
    parser.add_argument(
        "--only", action="append", choices=SCENARIOS, help="repeat it for several"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terminations", type=int, default=8)
    parser.add_argument("--tries", type=int, default=3, help="of other drawn faults")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--jobs", type=int, default=1, help="scenarios at once")
    parser.add_argument("--data-dir", type=Path, help="of tfds; default: in --workdir")
    parser.add_argument("--json", type=Path, help="file for what was seen")
    options = parser.parse_args(arguments)
    if min(options.kills, options.terminations, options.tries, options.jobs) < 1:
        parser.error("--kills, --terminations, --tries and --jobs are at least 1")
    if options.steps < 20:
        parser.error("--steps is at least 20, for several checkpoints")
    return options


def write(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    """Writes all that was seen as JSON."""
    counts = ("seed", "steps", "kills", "terminations", "tries", "jobs")
    content: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": {name: getattr(options, name) for name in counts},
        "environment": environment(),
        "outcomes": [
            dataclasses.asdict(outcome) | {"seconds": round(outcome.seconds, 1)}
            for outcome in outcomes
        ],
    }
    options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
