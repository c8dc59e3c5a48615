"""Compile time, step time and memory of deep CIFAR nets, unrolled and scanned.

    python -m benchmarks.deep_nets --json FILE
    python -m benchmarks.deep_nets --depths 1202 --batch 8 --json FILE

Each net is compiled and stepped in a process of its own, so that the peak memory is
its own; the training step is the library's, on random images on the device. A process
that takes longer than --limit seconds or more memory than --gigabytes is stopped, and
its row says so. What ``models.catalog.scans_by_default`` chooses rests on this table.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import record
from resnet_jax.training.benchmark import synthetic_step

FORMS: dict[str, dict[str, Any]] = {
    "unrolled": {"scan": False},
    "scanned": {"scan": True},
    "scanned, remat": {"scan": True, "remat": True},
}


def measure(depth: int, form: str, batch_size: int, steps: int) -> dict[str, Any]:
    """Seconds to compile, seconds a step, and the process's peak memory."""
    train_step, state, batch = synthetic_step(
        f"cifar_resnet{depth}", batch_size, 32, "float32", **FORMS[form]
    )
    start = time.perf_counter()
    compiled = train_step.lower(state, None, batch).compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(state, None, batch))
        seconds.append(time.perf_counter() - start)
    # The smallest: the first step touches fresh memory, and others meet interruptions.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "compile_seconds": compile_seconds,
        "step_seconds": min(seconds),
        "peak_gib": peak,
        "status": "measured",
    }


def measure_apart(depth: int, form: str, options: argparse.Namespace) -> dict[str, Any]:
    """``measure`` in a process of its own, within the limits."""
    command = [sys.executable, "-m", "benchmarks.deep_nets", "--one", str(depth), form]
    command += ["--batch", str(options.batch), "--steps", str(options.steps)]
    command += ["--gigabytes", str(options.gigabytes)]
    row: dict[str, Any] = {"depth": depth, "form": form, "batch_size": options.batch}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=options.limit,
        )
    except subprocess.TimeoutExpired:
        return row | {"status": f"stopped after {options.limit} s"}
    if done.returncode:
        return row | {"status": f"failed within {options.gigabytes:g} GB of memory"}
    return row | json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the JSON."""
    options = _parse(arguments)
    if options.one:
        depth, form = options.one
        limit = int(options.gigabytes * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        result = measure(int(depth), form, options.batch, options.steps)
        print(json.dumps(result))
        return
    content = record.circumstances("deep_nets", arguments)
    print(f"batch {options.batch}, 32 px, float32; {content['environment']['devices']}")
    print(f"{'depth':>6}  {'form':<16}{'compile s':>10}{'s/step':>9}{'peak GiB':>10}")
    rows = []
    for depth in options.depths:
        for form in FORMS:
            row = measure_apart(depth, form, options)
            rows.append(row)
            figures = row["status"]
            if figures == "measured":
                figures = (
                    f"{row['compile_seconds']:>10.1f}{row['step_seconds']:>9.2f}"
                    f"{row['peak_gib']:>10.2f}"
                )
            print(f"{depth:>6}  {form:<16}{figures}", flush=True)
    record.write(options.json, content | {"rows": rows})


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.deep_nets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[20, 56, 110, 302, 1202], metavar="N"
    )
    parser.add_argument("--batch", type=record.positive, default=8, metavar="N")
    parser.add_argument("--steps", type=record.positive, default=3, metavar="N")
    parser.add_argument("--limit", type=record.positive, default=400, metavar="SECONDS")
    parser.add_argument("--gigabytes", type=float, default=12, metavar="GB")
    parser.add_argument("--one", nargs=2, metavar=("DEPTH", "FORM"), help="this alone")
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
