"""One short run on one GPU: the cases that matter most, in their order.

    python -m benchmarks.gpu --minutes 7 --out FOLDER
    python -m benchmarks.gpu --out FOLDER --tiny       # a trial on the CPU

ResNet-50's training step in bfloat16, ours in several forms, Flax's example and torch;
then ResNet-20 on small images that lie on the device, beside torch; then inference.
Each case is a process of its own. The next one imports its libraries while a case is
measured, and touches the device only when its turn has come. The JSON is written after
each case; what does not fit into --minutes is recorded as not measured.

Of the first two forms the compiled program and the trace of three steps come along.
"""

import argparse
import contextlib
import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_small_images, gpu_training, hlo, record
from benchmarks.gpu_contenders import SWITCHES, prepared
from benchmarks.gpu_contenders import Case as Step

CANDIDATE = (("fused_norm", True), ("norm_variance", "fast"))
TRACED = ("default", "candidate")


def plan(tiny: bool) -> list[dict[str, Any]]:
    """The cases, in the order of what matters."""
    model, batch = ("cifar_resnet8", 4) if tiny else ("resnet50", 256)

    def step(framework: str, way: str) -> dict[str, Any]:
        return dataclasses.asdict(Step(framework, model, batch, way))

    def small(framework: str, precision: str, **rest: Any) -> dict[str, Any]:
        rest.setdefault("calls", (128,) if framework == "jax" else ("compiled",))
        depth = 20
        if tiny:
            depth, rest["calls"] = 8, (2,) if framework == "jax" else ("eager",)
        case = gpu_small_images.Case(framework, depth, precision, **rest)
        return dataclasses.asdict(case)

    return [
        {"ceilings": True, "framework": "jax"},
        step("ours", "default"),
        step("ours", "candidate"),
        step("flax", "jitted"),
        step("ours", "fast variance"),
        step("torch", "eager" if tiny else "compiled"),
        step("ours", "fused, fast"),
        small("jax", "tf32", flags="graphs"),
        small("jax", "bfloat16", flags="graphs", options=CANDIDATE),
        small("torch", "bfloat16"),
        small("jax", "bfloat16"),
        step("torch", "eager"),
        small("torch", "tf32"),
        small("jax", "bfloat16", flags="graphs"),
        step("ours", "fast, pool"),
        small("jax", "tf32"),
        step("ours", "folded"),
        step("torch", "folded, eager" if tiny else "folded, compiled"),
        step("ours", "inference"),
        small("jax", "bfloat16", options=CANDIDATE),
        step("ours", "candidate, pointwise"),
    ]


def flags_of(case: dict[str, Any]) -> str:
    """XLA's flags of a case."""
    if "depth" in case:
        return gpu_small_images.FLAGS[case["flags"]]
    way = case.get("way")
    return SWITCHES[way].flags if way in SWITCHES else ""


class Worker:
    """A process that has its libraries and waits for its case."""

    def __init__(self, case: dict[str, Any], out: str, tiny: bool):
        self.case = case
        before = os.environ.get("XLA_FLAGS", "")
        flags = f"{before} {flags_of(case)}".strip()
        library = "torch" if case["framework"] == "torch" else "jax"
        command = [sys.executable, "-m", "benchmarks.gpu", "--worker", library]
        self._process = subprocess.Popen(
            [*command, "--out", out, *(["--tiny"] if tiny else [])],
            env=os.environ | {"XLA_FLAGS": flags},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        # Filled pipes would stop it while it waits.
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors.extend(self._process.stderr)

    def measure(self, seconds: float) -> list[dict[str, Any]]:
        """The case's rows; it is stopped after so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self.stop)
        timer.start()
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(self.case) + "\n")
            self._process.stdin.close()
        lines = [line for line in self._process.stdout if line[:1] == "{"]
        in_time = timer.is_alive()
        timer.cancel()
        self._process.wait()
        self._reader.join(2)
        rows = [json.loads(line) for line in lines]
        if not rows:
            fault = "".join(self._errors).strip()[-1500:]
            rows = [{"status": fault if in_time else "out of time"}]
        return [self.case | row for row in rows]

    def stop(self) -> None:
        """Ends it, and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def work(library: str, out: str, tiny: bool) -> None:
    """A worker's life: imports, one case, its rows."""
    if library == "torch":
        import torch._dynamo
        import torch._inductor.compile_fx
        import torch.fx.experimental.optimization  # noqa: F401
    else:
        import benchmarks.train_step  # noqa: F401
        import resnet_jax.training.benchmark  # noqa: F401
    case = json.loads(sys.stdin.readline())
    if "ceilings" in case:
        print(json.dumps(ceilings(out, tiny)), flush=True)
    elif "depth" in case:
        size = gpu_small_images.TINY if tiny else gpu_small_images.Size()
        given = case | {
            "calls": tuple(case["calls"]),
            "options": tuple((name, value) for name, value in case["options"]),
        }
        gpu_small_images.run_case(gpu_small_images.Case(**given), size)
    else:
        _step(Step(**case), Path(out), tiny)


def _step(case: Step, out: Path, tiny: bool) -> None:
    start = time.perf_counter()
    running = prepared(case)
    size = gpu_training.TINY if tiny else gpu_training.Size(windows=4)
    row = gpu_training.measured(case, size, running, start)
    print(json.dumps(row), flush=True)
    if running.program is None or case.framework != "ours":
        return
    text = running.program.as_text()
    name = case.way.replace(", ", "_").replace(" ", "_")
    (out / f"hlo_{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
    if case.way not in TRACED:
        return
    import jax

    folder = out / f"trace_{name}"
    with jax.profiler.trace(str(folder)):
        running.run(3)
    traces = sorted(folder.rglob("*.xplane.pb"))
    rows = traced_operations(str(traces[-1]), text, steps=3)
    (out / f"operations_{name}.json").write_text(json.dumps(rows, indent=0))
    print(json.dumps({"status": "traced", "kinds": by_kind(rows)}), flush=True)


def traced_operations(path: str, text: str, steps: int) -> list[dict[str, Any]]:
    """What the device ran, by operation of the program, the longest first.

    A row has the operation and its kind; its kernels, microseconds, bytes and
    multiply-adds a step. A kernel that is no operation of the program has no bytes.
    """
    import jax

    known = {
        _plain(operation.name): operation
        for operation in hlo.operations(hlo.read(text))
    }
    times: dict[str, list[float]] = {}
    graphed: set[str] = set()
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            for event in line.events:
                name = str(dict(event.stats).get("hlo_op", event.name))
                # A graph's kernels bear their own names, and equal ones share one.
                if name.startswith("command_buffer"):
                    name = event.name
                    graphed.add(_plain(name))
                times.setdefault(_plain(name), []).append(event.duration_ns / 1000)
    rows = []
    for name, durations in times.items():
        operation = known.get(name)
        count = len(durations) / steps
        row = {
            "operation": name[:80],
            "kind": "unknown" if operation is None else operation.kind,
            "kernels": round(count, 2),
            "microseconds": round(sum(durations) / steps, 1),
            "bytes": 0,
            "multiply_adds": 0,
        }
        if operation is not None:
            times_run = count if name in graphed else 1
            row["bytes"] = round(operation.nbytes * times_run)
            row["multiply_adds"] = operation.multiply_adds
        rows.append(row)
    return sorted(rows, key=lambda row: -row["microseconds"])


def by_kind(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Sums of the operations of each kind."""
    kinds: dict[str, dict[str, float]] = {}
    for row in rows:
        of_kind = kinds.setdefault(str(row["kind"]), {})
        for field in ("kernels", "microseconds", "bytes", "multiply_adds"):
            of_kind[field] = of_kind.get(field, 0) + row[field]
    for of_kind in kinds.values():
        of_kind["gigabytes_a_second"] = (
            of_kind["bytes"] / of_kind["microseconds"] / 1000
            if of_kind["microseconds"]
            else 0
        )
    return kinds


def _plain(name: str) -> str:
    """A name as both HLO and kernels may write it."""
    return name.lstrip("%").replace(".", "_").replace("-", "_")


def ceilings(out: str, tiny: bool) -> dict[str, Any]:
    """What a large copy and a large product reach, and how XLA describes the device."""
    import jax
    import jax.numpy as jnp

    def seconds(function: Any, *arguments: Any) -> float:
        compiled = jax.jit(function)
        for _ in range(3):
            jax.block_until_ready(compiled(*arguments))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(10):
                result = compiled(*arguments)
            jax.block_until_ready(result)
            times.append((time.perf_counter() - start) / 10)
        return sorted(times)[2]

    words, side = (2**20, 128) if tiny else (2**29, 8192)
    row: dict[str, Any] = {"status": "measured"}
    array = jnp.arange(words, dtype=jnp.uint32)
    row["copy_gigabytes_a_second"] = 8 * words / seconds(lambda x: x ^ 1, array) / 1e9
    del array
    a, b = (
        jax.random.normal(jax.random.key(seed), (side, side), jnp.bfloat16)
        for seed in (0, 1)
    )
    duration = seconds(lambda a, b: a @ b, a, b)
    row["product_teraflops"] = 2 * side**3 / duration / 1e12
    row["jax"], row["device"] = jax.__version__, jax.devices()[0].device_kind
    try:
        from jax._src.lib import xla_client

        topology = xla_client.get_topology_for_devices(jax.devices())
        Path(out, "target_config.txt").write_text(str(topology.target_config))
    except Exception as error:
        row["target_config"] = f"{type(error).__name__}: {error}"
    return row


def print_row(row: dict[str, Any]) -> None:
    """Prints a line."""
    if "depth" in row:
        options = "candidate" if row["options"] else ""
        what = (
            f"resnet{row['depth']} b128 {row['framework']:<6}{row['precision']:<9}"
            f"{row['call']!s:<9}{row['flags']:<9}{options}"
        )
    elif "ceilings" in row:
        what = "ceilings"
    else:
        what = f"{row['model']} b{row['batch']} {row['framework']:<6}{row['way']}"
    if row["status"] == "traced":
        for kind, sums in row["kinds"].items():
            print(
                f"    {kind:<12}{sums['kernels']:>7.0f}{sums['microseconds']:>10.0f} us"
                f"{sums['bytes'] / 1e9:>8.1f} GB{sums['gigabytes_a_second']:>8.0f} GB/s"
            )
        return
    figures = row["status"][-300:]
    if "images_per_second" in row:
        peak = row.get("peak_bytes")
        ready = row.get("ready_seconds", row.get("first_call_seconds", 0))
        figures = (
            f"{row['milliseconds']:>9.3f} ms{row['images_per_second']:>11,.0f} images/s"
            f"{'' if peak is None else f'{peak / 2**30:>6.1f} GiB'}"
            f"  ready {ready:.1f} s"
            f"{'' if row['finite'] else '  NOT FINITE'}"
        )
    elif "ceilings" in row and row["status"] == "measured":
        figures = (
            f"copy {row['copy_gigabytes_a_second']:,.0f} GB/s, product "
            f"{row['product_teraflops']:,.0f} TFLOP/s"
        )
    print(f"{what:<50}{figures}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Measures the cases that fit into the time, and prints the table at the end."""
    options = _parse(arguments)
    if options.worker is not None:
        work(options.worker, options.out, options.tiny)
        return
    start = time.monotonic()
    end = start + 60 * options.minutes
    Path(options.out).mkdir(parents=True, exist_ok=True)
    cases = plan(options.tiny)
    rows: list[dict[str, Any]] = []
    content = {
        "benchmark": "gpu",
        "arguments": list(arguments),
        "nvidia_smi": _nvidia_smi(),
    }
    worker: Worker | None = Worker(cases[0], options.out, options.tiny)
    for index, case in enumerate(cases):
        following = cases[index + 1 : index + 2]
        left = min(end - time.monotonic(), 60 * options.case_minutes)
        ready = None
        if following and end - time.monotonic() > 30:
            ready = Worker(following[0], options.out, options.tiny)
        if worker is None or left < 10:
            new = [case | {"status": "not measured: out of time"}]
            if worker is not None:
                worker.stop()
        else:
            new = worker.measure(left)
        if "depth" in case:
            for row in new:
                row.setdefault("call", case["calls"][0])
        for row in new:
            row["at_second"] = round(time.monotonic() - start, 1)
            print_row(row)
        rows += new
        worker = ready
        record.write(f"{options.out}/gpu.json", content | {"rows": rows})
    print("\nsummary")
    for row in rows:
        print_row(row)


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
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--case-minutes", type=float, default=1.7)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
