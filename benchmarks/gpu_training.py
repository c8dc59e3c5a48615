"""Training speed of the ImageNet nets on one GPU, beside torch and Flax's example.

    python -m benchmarks.gpu_training --json FILE
    python -m benchmarks.gpu_training --models resnet50 --batches 256 --switches all
    python -m benchmarks.gpu_training --images FOLDER --models resnet50 --batches 256
    python -m benchmarks.gpu_training --tiny       # a trial on the CPU

The training step on one fixed batch of random uint8 images that lies on the device:
normalisation inside, convolutions and maps in bfloat16, batch normalisation, SGD with
momentum 0.9 and weight decay 1e-4 on every parameter; no augmentation.

  ours   the library's step (which counts errors besides), with the switches asked for
  flax   the net of Flax's ImageNet example (benchmarks/peers.py), jitted and donated
  torch  timm's or torchvision's net, or where neither is installed that of
         benchmarks/peers_torch.py; channels_last, autocast, fused SGD; eager, and
         compiled by torch.compile

With the first net and batch also inference: evaluation's forward pass, ours with its
normalisations and with these folded into the convolutions, and torch's folded, its
weights in bfloat16. With --images, likewise, our step fed by the input pipeline from
FOLDER/CLASS/IMAGE, in Inception's crops, and the pipeline alone.

Each case is a process of its own and has its time; one that fails says why. A case
compiles, warms up and runs windows of about a second; its figure is their median. What
is compared does not take turns, and rests on the GPU having nothing else to do. Cases
stand in the order of what they matter; what does not fit into --minutes is recorded as
not measured. A switch is a line of ``SWITCHES``; what is expected of each stands in
benchmarks/notes.md.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import processes, record
from benchmarks.gpu_contenders import SWITCHES, Case, Running, prepared

FRAMEWORKS = ("ours", "torch", "flax")
MODELS = ("resnet50", "resnet18", "resnet101", "resnet152")
BATCHES = (256, 128, 512)
TINY_MODEL = "cifar_resnet8"


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured: steps to warm up, seconds a window, and windows."""

    warm: int = 3
    window: float = 1.0
    windows: int = 5


TINY = Size(warm=1, window=0.01, windows=2)


def plan(
    models: Sequence[str],
    batches: Sequence[int],
    frameworks: Sequence[str],
    switches: Sequence[str],
    images: str | None = None,
    compiled: bool = True,
) -> list[Case]:
    """The cases, in the order of what matters.

    Switches are compared, inference is measured and images are read with the first net
    and batch.

    Args:
      models: of the catalog.
      batches: images a step.
      frameworks: of ``FRAMEWORKS``.
      switches: keys of ``SWITCHES`` beside "default".
      images: folder for the input pipeline.
      compiled: whether torch is compiled too.
    """
    torch_ways = ("compiled", "eager") if compiled else ("eager",)
    ways = {"ours": ("default",), "torch": torch_ways, "flax": ("jitted",)}
    inference = {
        "ours": ("inference", "folded"),
        "torch": tuple(f"folded, {way}" for way in torch_ways),
        "flax": (),
    }
    cases = []
    for model in models:
        for batch in batches:
            cases += [
                Case(framework, model, batch, way)
                for framework in frameworks
                for way in ways[framework]
            ]
            if (model, batch) != (models[0], batches[0]):
                continue
            cases += [
                Case(framework, model, batch, way)
                for framework in frameworks
                for way in inference[framework]
            ]
            if "ours" not in frameworks:
                continue
            if images is not None:
                cases += [
                    Case("ours", model, batch, way, images)
                    for way in ("end to end", "input alone")
                ]
            cases += [
                Case("ours", model, batch, name)
                for name in switches
                if name != "default"
            ]
    return cases


def run_case(case: Case, size: Size) -> dict[str, Any]:
    """Measures a case in this process."""
    start = time.perf_counter()
    return measured(case, size, prepared(case), start)


def measured(case: Case, size: Size, running: Running, start: float) -> dict[str, Any]:
    """The row of what is prepared since ``start``."""
    # The first step compiles; then caches are filled and algorithms chosen.
    finite = running.run(1)
    ready = time.perf_counter() - start
    running.run(size.warm)
    start = time.perf_counter()
    running.run(size.warm)
    each = (time.perf_counter() - start) / size.warm
    steps = max(1, math.ceil(size.window / each))
    seconds = []
    for _ in range(size.windows):
        start = time.perf_counter()
        finite &= running.run(steps)
        seconds.append(time.perf_counter() - start)
    milliseconds = [1000 * window / steps for window in seconds]
    median = statistics.median(milliseconds)
    return {
        "status": "measured",
        "finite": finite,
        "ready_seconds": ready,
        "milliseconds": median,
        "milliseconds_min": min(milliseconds),
        "milliseconds_max": max(milliseconds),
        "images_per_second": 1000 * case.batch / median,
        "peak_bytes": running.peak(),
        "steps_a_window": steps,
        "window_seconds": seconds,
        **running.facts,
    }


def measure(case: Case, tiny: bool, seconds: float) -> dict[str, Any]:
    """The row of a case, measured in a process that is stopped after ``seconds``."""
    row = dataclasses.asdict(case) | {"flags": case.flags}
    if case.way in SWITCHES:
        row["options"] = SWITCHES[case.way].options
    if seconds < 1:
        return row | {"status": "not measured: out of time"}
    if not processes.knows(case.flags):
        return row | {"status": "not measured: flags unknown to this jaxlib"}
    arguments = ["--case", json.dumps(dataclasses.asdict(case))]
    arguments += ["--tiny"] if tiny else []
    found, fault = processes.run("gpu_training", arguments, case.flags, seconds)
    return row | (found[0] if found else {"status": fault})


def print_row(row: dict[str, Any]) -> None:
    """Prints a line."""
    what = f"{row['model']:<14}{row['batch']:>5}  {row['framework']:<6}{row['way']:<18}"
    figures = row["status"]
    if figures == "measured":
        spread = f"({row['milliseconds_min']:.1f} .. {row['milliseconds_max']:.1f})"
        peak = row["peak_bytes"]
        memory = "" if peak is None else f"{peak / 2**30:.1f}"
        traffic = row.get("xla_bytes_an_image")
        moved = "" if traffic is None else f"{traffic / 1e6:,.0f}"
        figures = (
            f"{row['milliseconds']:>9.2f}  {spread:<20}"
            f"{row['images_per_second']:>10,.1f}{memory:>7}{moved:>8}"
            f"{row['ready_seconds']:>8.1f}"
        )
    print(f"{what}{figures}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Measures all cases that fit into the time and writes the JSON after each."""
    options = _parse(arguments)
    size = TINY if options.tiny else Size()
    if options.case is not None:
        case = Case(**json.loads(options.case))
        print(json.dumps(run_case(case, size)), flush=True)
        return
    end = time.monotonic() + 60 * options.minutes
    # This process names the device, and must not take its memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    content = record.circumstances("gpu_training", arguments)
    cases = plan(
        options.models or ([TINY_MODEL] if options.tiny else MODELS),
        options.batches or ([4] if options.tiny else BATCHES),
        options.frameworks or FRAMEWORKS,
        list(SWITCHES) if "all" in options.switches else options.switches,
        options.images,
        compiled=not options.tiny,
    )
    print(
        f"training steps and inference, bfloat16, {content['environment']['devices']}; "
        f"medians of {size.windows} windows of {size.window} s\n"
        f"{'net':<14}{'batch':>5}  {'':<6}{'':<18}{'ms/step':>9}  {'':<20}"
        f"{'images/s':>10}{'GiB':>7}{'MB/im.':>8}{'ready':>8}"
    )
    rows: list[dict[str, Any]] = []
    for case in cases:
        left = min(end - time.monotonic(), 60 * options.case_minutes)
        rows.append(measure(case, options.tiny, left))
        print_row(rows[-1])
        result = {"size": dataclasses.asdict(size), "rows": rows}
        record.write(options.json, content | result)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"of {MODELS}")
    parser.add_argument(
        "--batches", nargs="+", type=record.positive, metavar="N", help=f"{BATCHES}"
    )
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS)
    parser.add_argument(
        "--switches",
        nargs="+",
        default=["default"],
        choices=["all", *SWITCHES],
        metavar="NAME",
        help="of our step, with the first net and batch: all, or any of "
        f"{', '.join(SWITCHES)}",
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="of CLASS/IMAGE, for the input pipeline"
    )
    parser.add_argument(
        "--minutes", type=float, default=9, help="for all cases (default: 9)"
    )
    parser.add_argument(
        "--case-minutes", type=float, default=2.5, help="for one (default: 2.5)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a trial of few and small cases"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    parser.add_argument("--case", metavar="JSON", help="one case, by the script itself")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
