"""Our input pipeline beside Flax's example's, tf.data's and torch's, on one core.

    python -m benchmarks.input_pipeline --images FOLDER/val --json FILE

FOLDER/val holds CLASS/IMAGE.jpg and is read again and again. Each contender is a
process on one core; all but the one whose turn it is are stopped, so that none fills
its buffers in another's time. A turn makes a few batches of 128. Ratios are medians of
the rounds' ratios. The contenders are in ``input_peers.py``.

Also measured: ours on two cores, and on the same images after ``resnet-jax prepare
--shorter-side 480 --quality 90``.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.input_peers import PEERS, jpeg_files

OURS = "resnet_jax"
_NEEDS = {"flax_tf": "tensorflow", "tf": "tensorflow", "torch": "torch"}


@dataclasses.dataclass(frozen=True)
class Contender:
    """A running process of ``input_peers``.

    Attributes:
      name: in the table.
      process: stopped but in its turn.
    """

    name: str
    process: subprocess.Popen[str]

    def turn(self, batches: int) -> dict[str, float]:
        """Makes some batches, alone; see ``input_peers``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(f"{batches}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} died")
        os.killpg(self.process.pid, signal.SIGSTOP)
        return json.loads(line)


@contextlib.contextmanager
def running(name: str, peer: str, images: str, batch: int, cores: Sequence[int]):
    """Starts a contender on the given cores; ends it with everything it started."""
    pin = f"import os; os.sched_setaffinity(0, {set(cores)});"
    run = (
        "import runpy; runpy.run_module('benchmarks.input_peers', run_name='__main__')"
    )
    argv = f"import sys; sys.argv = ['', {peer!r}, {images!r}, '{batch}'];"
    process = subprocess.Popen(
        [sys.executable, "-c", pin + argv + run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    try:
        yield Contender(name, process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def missing(peer: str) -> str | None:
    """The package that a peer needs and that is not installed."""
    for prefix, package in _NEEDS.items():
        if peer.startswith(prefix) and importlib.util.find_spec(package) is None:
            return package
    return None


@contextlib.contextmanager
def prepared(images: str) -> Iterator[str]:
    """The same images, re-encoded by ``resnet-jax prepare``, as a split's path."""
    import resnet_jax

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "prepared"
        resnet_jax.prepare_dataset(
            str(Path(images).parent),
            str(target),
            splits=(Path(images).name,),
            shorter_side=480,
            quality=90,
        )
        yield str(target / Path(images).name)


def measure(
    contenders: Sequence[Contender], rounds: int, batches: int
) -> dict[str, list[dict[str, float]]]:
    """The turns of every contender by its name."""
    for contender in contenders:
        contender.turn(2)  # starts threads and fills pools
    turns: dict[str, list[dict[str, float]]] = {c.name: [] for c in contenders}
    for number in range(rounds):
        for contender in contenders:
            turns[contender.name].append(contender.turn(batches))
        speeds = {
            name: round(t[-1]["images"] / t[-1]["seconds"]) for name, t in turns.items()
        }
        print(f"round {number + 1}: {speeds}", flush=True)
    return turns


def summarize(turns: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row a contender: medians, and our speed over its own in the same round."""
    rows = []
    for name, own in turns.items():
        speeds = [turn["images"] / turn["seconds"] for turn in own]
        ours = [turn["images"] / turn["seconds"] for turn in turns[OURS]]
        rows.append(
            {
                "name": name,
                "images_per_second": statistics.median(speeds),
                "images_per_second_min": min(speeds),
                "images_per_second_max": max(speeds),
                "ours_over_this": statistics.median(
                    a / b for a, b in zip(ours, speeds, strict=True)
                ),
                "peak_mib": own[-1]["peak_mib"],
                "images_per_second_of_rounds": speeds,
            }
        )
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a line a contender."""
    print(
        f"{'contender':<24}{'images/s':>10}  {'(min .. max)':<18}"
        f"{'ours/this':>11}{'MiB':>8}"
    )
    for row in rows:
        spread = (
            f"({row['images_per_second_min']:.0f} .. "
            f"{row['images_per_second_max']:.0f})"
        )
        print(
            f"{row['name']:<24}{row['images_per_second']:>10.0f}  {spread:<18}"
            f"{row['ours_over_this']:>11.2f}"
            f"{row['peak_mib']:>8.0f}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    options = _parse(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    content = record.circumstances("input_pipeline", given)
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:

        def start(name: str, peer: str, images: str, number: int) -> Contender:
            held = running(name, peer, images, options.batch, cores[:number])
            return stack.enter_context(held)

        # What is compared most closely takes its turns next to each other.
        contenders = []
        if len(cores) > 1:
            contenders.append(start("resnet_jax, 2 cores", OURS, options.images, 2))
        contenders.append(start(OURS, OURS, options.images, 1))
        present = [peer for peer in PEERS if peer != OURS and missing(peer) is None]
        contenders += [start(peer, peer, options.images, 1) for peer in present]
        smaller = stack.enter_context(prepared(options.images))
        contenders.insert(-1, start("resnet_jax, prepared", OURS, smaller, 1))
        for peer in set(PEERS) - set(present) - {OURS}:
            print(f"{peer}: {missing(peer)} is not installed")
        turns = measure(contenders, options.rounds, options.batches)
    rows = summarize(turns)
    print_table(rows)
    files = jpeg_files(options.images)
    result = {
        "images": len(files),
        "mean_bytes": statistics.mean(Path(file).stat().st_size for file in files),
        "batch_size": options.batch,
        "rounds": options.rounds,
        "batches_a_turn": options.batches,
        "contenders": rows,
        "turns": turns,
    }
    record.write(options.json, content | result)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, metavar="FOLDER/SPLIT")
    parser.add_argument("--batch", type=record.positive, default=128, metavar="N")
    parser.add_argument("--rounds", type=record.positive, default=5, metavar="N")
    parser.add_argument(
        "--batches", type=record.positive, default=12, help="a turn (default: 12)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
