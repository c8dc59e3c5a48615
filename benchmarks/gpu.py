"""One short run on one GPU, the most important cases first.

    python -m benchmarks.gpu --minutes 9 --out FOLDER
    python -m benchmarks.gpu --out FOLDER --tiny         # a trial on the CPU
    python -m benchmarks.gpu --out FOLDER --paper --data "FOLDER/CIFAR-10 (JPEG q75)"

Cases: ResNet-50's training step in bfloat16, ours in several forms, Flax's example's
and torch's; ResNet-20 on small images on the device, beside torch; inference. Each case
has its own process. The next process imports its libraries while a case is measured,
and waits. Windows last about a second; the figure is
their median. FOLDER/gpu.json is written after each case; cases that do not fit into
--minutes are recorded as not measured.

Of our steps of ResNet-50 the compiled program is kept, and of the default a trace of
three steps with the time and traffic of each operation.

--paper trains ResNet-20 and plain-20, then the nets of 56 layers, at the paper's length
(table6, one seed), and prints ``resnet-jax paper report``. The same command continues.
"""

import argparse
import contextlib
import dataclasses
import gzip
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import hlo, record

TRACED = "default"
STEPS_PER_CALL = 128
_MATMUL = {"tf32": "tensorfloat32", "bfloat16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
      kind: ceilings, step, resident (images on the device, many steps per call) or
        inference.
      framework: ours, flax or torch.
      name: of the form. Torch's says whether it is "compiled" or "eager".
      model: of ``peers.LAYOUTS``.
      batch: images per step.
      precision: bfloat16, or tf32: float32 whose products may round their factors.
      options: of our net.
    """

    kind: str
    framework: str = "ours"
    name: str = ""
    model: str = ""
    batch: int = 0
    precision: str = "bfloat16"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured."""

    warm: int = 3
    window_seconds: float = 1.0
    windows: int = 4
    num_images: int = 50_000
    steps_per_call: int = STEPS_PER_CALL


TINY = Size(warm=1, window_seconds=0.01, windows=2, num_images=40, steps_per_call=2)


def plan(tiny: bool) -> list[Case]:
    """The cases, the most important first."""
    large: dict[str, Any] = {"model": "resnet50", "batch": 256}
    small: dict[str, Any] = {"model": "cifar_resnet20", "batch": 128}
    compiled = "compiled"
    if tiny:
        large = small = {"model": "cifar_resnet8", "batch": 4}
        compiled = "eager"
    automatic: dict[str, Any] = {
        "name": "automatic gradients",
        "options": {"fused_norm": False},
    }
    xla: dict[str, Any] = {
        "name": "XLA's convolutions",
        "options": {"conv_algorithm": "xla"},
    }
    cases = [
        Case("ceilings"),
        Case("step", "ours", "default", **large),
        Case("step", "flax", "jitted", **large),
        Case("step", "torch", compiled, **large),
        Case("resident", "ours", "default", **small),
        Case("resident", "torch", compiled, **small),
        Case("inference", "ours", "folded", **large),
        Case("inference", "torch", compiled, **large),
        Case("step", "ours", **automatic, **large),
        Case("step", "ours", **xla, **large),
        Case("resident", "ours", **xla, **small),
        Case("resident", "ours", "default", precision="tf32", **small),
        Case("resident", "torch", compiled, precision="tf32", **small),
        Case("inference", "ours", "default", **large),
        Case("step", "torch", "eager", **large),
    ]
    if tiny:
        # One of each kind and framework; a CPU compiles for long.
        chosen = {(case.kind, case.framework): case for case in reversed(cases)}
        cases = [case for case in cases if case in chosen.values()]
    return cases


class Worker:
    """A process that has imported its libraries and waits for its case."""

    def __init__(self, case: Case, out: str, tiny: bool):
        self.case = case
        library = "torch" if case.framework == "torch" else "jax"
        command = [sys.executable, "-m", "benchmarks.gpu", "--worker", library]
        self._process = subprocess.Popen(
            [*command, "--out", out, *(["--tiny"] if tiny else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        # A full pipe would block it.
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors.extend(self._process.stderr)

    def measure(self, seconds: float) -> list[dict[str, Any]]:
        """The rows of the case; the process is killed after ``seconds``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self.stop)
        timer.start()
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(dataclasses.asdict(self.case)) + "\n")
            self._process.stdin.close()
        rows = [json.loads(line) for line in self._process.stdout if line[:1] == "{"]
        in_time = timer.is_alive()
        timer.cancel()
        self._process.wait()
        self._reader.join(2)
        if not rows:
            fault = fault_line("".join(self._errors)) if in_time else "out of time"
            rows = [{"status": f"not measured: {fault}"}]
        return [dataclasses.asdict(self.case) | row for row in rows]

    def stop(self) -> None:
        """Kills it and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def fault_line(text: str) -> str:
    """The last error of a process in one line, without paths."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    last = (errors or lines or ["no output"])[-1]
    return re.sub(r"\S*/\S*/\S*", "...", last)[:200]


def work(library: str, out: Path, tiny: bool) -> None:
    """The life of a worker: imports, one case, its rows."""
    from benchmarks import contenders  # noqa: F401

    if library == "torch":
        import torch._dynamo
        import torch._inductor.compile_fx
        import torch.fx.experimental.optimization  # noqa: F401
    case = Case(**json.loads(sys.stdin.readline()))
    if case.kind == "ceilings":
        print(json.dumps(ceilings(out, tiny)), flush=True)
        return
    size = TINY if tiny else Size()
    start = time.perf_counter()
    contender = prepared(case, size)
    row = measured(contender, case.batch, size, start)
    print(json.dumps(row | {"peak_bytes": _peak(library)}), flush=True)
    if contender.program is not None:
        name = re.sub(r"\W+", "_", case.name)
        text = contender.program.as_text() or ""
        (out / f"hlo_{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
        if case.name == TRACED:
            rows = traced(contender, text, out / f"trace_{name}")
            (out / f"operations_{name}.json").write_text(json.dumps(rows, indent=0))
            print(
                json.dumps({"status": "traced", "kinds": hlo.sums_by_kind(rows)}),
                flush=True,
            )


def prepared(case: Case, size: Size) -> Any:
    """Builds the contender of a case."""
    from benchmarks import contenders

    model, batch, name = case.model, case.batch, case.name
    if case.framework == "torch":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        where: dict[str, Any] = {"device": device, "compiled": name == "compiled"}
        if case.kind == "step":
            return contenders.torch_step(model, batch, case.precision, **where)
        if case.kind == "inference":
            return contenders.torch_inference(model, batch, **where)
        return contenders.torch_resident_steps(
            model, batch, case.precision, num_images=size.num_images, **where
        )
    import jax

    jax.config.update("jax_default_matmul_precision", _MATMUL[case.precision])
    dtype = "bfloat16" if case.precision == "bfloat16" else "float32"
    if case.framework == "flax":
        return contenders.flax_step(model, batch, dtype)
    if case.kind == "step":
        return contenders.our_step(model, batch, dtype, name, **case.options)
    if case.kind == "inference":
        return contenders.our_inference(model, batch, name == "folded")
    return contenders.our_resident_steps(
        model,
        batch,
        dtype,
        steps=size.steps_per_call,
        num_images=size.num_images,
        **case.options,
    )


def measured(contender: Any, batch: int, size: Size, start: float) -> dict[str, Any]:
    """The row of a contender that was begun at ``start``."""
    # The first call compiles; the others fill caches and choose algorithms.
    finite = contender.run(1)
    ready = time.perf_counter() - start
    warm = size.warm * contender.unit
    contender.run(warm)
    start = time.perf_counter()
    contender.run(warm)
    each = (time.perf_counter() - start) / size.warm
    steps = contender.unit * max(1, math.ceil(size.window_seconds / each))
    seconds = []
    for _ in range(size.windows):
        start = time.perf_counter()
        finite &= contender.run(steps)
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
        "images_per_second": 1000 * batch / median,
        "steps_a_window": steps,
        "window_seconds": seconds,
        **contender.facts,
    }


def traced(contender: Any, text: str, folder: Path) -> list[dict[str, Any]]:
    """The operations of three steps on the device; see ``hlo.attributed``."""
    import jax

    with jax.profiler.trace(str(folder)):
        contender.run(3)
    path = max(folder.rglob("*.xplane.pb"))
    launches = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        stats = {key: value for key, value in event.stats if key}
                        name = str(stats.get("hlo_op", event.name))
                        launches.append((name, event.name, event.duration_ns / 1000))
    return hlo.attributed(launches, hlo.operations(hlo.read(text)), steps=3)


def ceilings(out: Path, tiny: bool) -> dict[str, Any]:
    """The rates of a large copy and a large product, and XLA's device description."""
    import jax
    import jax.numpy as jnp

    from resnet_jax.environment import environment

    def seconds(function: Any, *arguments: Any) -> float:
        compiled = jax.jit(function)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            for _ in range(10):
                result = compiled(*arguments)
            jax.block_until_ready(result)
            times.append((time.perf_counter() - start) / 10)
        return statistics.median(times[1:])

    words, side = (2**20, 128) if tiny else (2**29, 8192)
    array = jnp.arange(words, dtype=jnp.uint32)
    copy = seconds(lambda x: x ^ 1, array)
    del array
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys)
    product = seconds(lambda a, b: a @ b, a, b)
    with contextlib.suppress(Exception):  # the library's internals may move
        from jax._src.lib import xla_client

        topology: Any = xla_client.get_topology_for_devices(jax.devices())
        (out / "target_config.txt").write_text(str(topology.target_config))
    return {
        "status": "measured",
        "copy_gigabytes_per_second": 8 * words / copy / 1e9,
        "product_teraflops": 2 * side**3 / product / 1e12,
        "environment": environment(),
    }


def _peak(library: str) -> int | None:
    """Bytes on the device at the fullest moment; None if unknown."""
    if library == "torch":
        import torch

        available = torch.cuda.is_available()
        return torch.cuda.max_memory_allocated() if available else None
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def paper(options: argparse.Namespace) -> None:
    """Table 6's nets of 20 and 56 layers; SIGTERM after --minutes makes a run save."""
    from resnet_jax.errors import Preempted
    from resnet_jax.paper.report import report
    from resnet_jax.paper.run import run_experiment
    from resnet_jax.paper.settings import Setting

    folder = Path(options.out) / "table6"
    overrides = {"model.dtype": "bfloat16"}
    scale = "tiny"
    if not options.tiny:
        scale = "paper"
        overrides |= {
            "evaluation.every_steps": "640",
            "checkpoint.every_steps": "6400",
            "training.log_every_steps": "640",
        }
    setting = Setting(options.data, scale, overrides | dict(options.override))
    stop = threading.Timer(60 * options.minutes, os.kill, (os.getpid(), signal.SIGTERM))
    stop.daemon = True
    stop.start()
    with contextlib.suppress(Preempted):
        for depth in (20,) if options.tiny else (20, 56):
            only = [f"cifar_resnet{depth}", f"cifar_plain{depth}"]
            run_experiment("table6", folder, only=only, seeds=1, setting=setting)
    stop.cancel()
    report(folder)
    print((folder / "report.md").read_text())


def print_row(row: dict[str, Any]) -> None:
    """Prints one line per row; of a trace one per kind."""
    if row["status"] == "traced":
        for kind, sums in row["kinds"].items():
            print(
                f"    {kind:<12}{sums['count']:>7.0f}{sums['microseconds']:>10.0f} us"
                f"{sums['bytes'] / 1e9:>8.1f} GB"
                f"{sums['gigabytes_per_second']:>8.0f} GB/s"
            )
        return
    what = " ".join(
        str(row[key])
        for key in ("kind", "model", "batch", "precision", "framework", "name")
    )
    figures = row["status"]
    if "images_per_second" in row:
        figures = (
            f"{row['milliseconds']:>9.3f} ms{row['images_per_second']:>11,.0f} images/s"
            f"  ready {row['ready_seconds']:.1f} s"
            f"{'' if row['finite'] else '  NOT FINITE'}"
        )
    elif "product_teraflops" in row:
        figures = (
            f"copy {row['copy_gigabytes_per_second']:,.0f} GB/s, product "
            f"{row['product_teraflops']:,.0f} TFLOP/s"
        )
    print(f"{what:<62}{figures}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Measures the cases that fit into the time."""
    options = _parse(arguments)
    if options.worker is not None:
        work(options.worker, Path(options.out), options.tiny)
        return
    if options.paper:
        paper(options)
        return
    start = time.monotonic()
    end = start + 60 * options.minutes
    Path(options.out).mkdir(parents=True, exist_ok=True)
    cases = plan(options.tiny)
    rows: list[dict[str, Any]] = []
    content = {
        "benchmark": "gpu",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *arguments]),
        "nvidia_smi": _nvidia_smi(),
        "rows": rows,
    }
    worker: Worker | None = Worker(cases[0], options.out, options.tiny)
    for index, case in enumerate(cases):
        left = min(end - time.monotonic(), 60 * options.case_minutes)
        ready = None
        if index + 1 < len(cases) and end - time.monotonic() > 30:
            ready = Worker(cases[index + 1], options.out, options.tiny)
        if worker is None or left < 10:
            new = [dataclasses.asdict(case) | {"status": "not measured: out of time"}]
            if worker is not None:
                worker.stop()
        else:
            new = worker.measure(left)
        for row in new:
            row["at_second"] = round(time.monotonic() - start, 1)
            print_row(row)
        rows += new
        worker = ready
        record.write(f"{options.out}/gpu.json", content)


def _nvidia_smi() -> str:
    fields = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--case-minutes", type=float, default=1.7)
    parser.add_argument("--tiny", action="store_true", help="a trial on the CPU")
    parser.add_argument("--paper", action="store_true", help="train table6")
    parser.add_argument("--data", metavar="FOLDER", help="data set for --paper")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        type=lambda text: tuple(text.split("=", 1)),
        metavar="FIELD=VALUE",
        help="of the config, for --paper",
    )
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
