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

With --images also our step fed by the input pipeline from FOLDER/CLASS/IMAGE, in
Inception's crops, and the pipeline alone.

Each case is a process of its own and has its time; one that fails says why. A case
compiles, warms up and runs windows of about a second; its figure is their median. What
is compared does not take turns, and rests on the GPU having nothing else to do. Cases
stand in the order of what they matter; what does not fit into --minutes is recorded as
not measured. A switch is a line of ``SWITCHES``; what is expected of each stands in
benchmarks/notes.md.
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import processes, record

FRAMEWORKS = ("ours", "torch", "flax")
MODELS = ("resnet50", "resnet18", "resnet101", "resnet152")
BATCHES = (256, 128, 512)
TINY_MODEL = "cifar_resnet8"
_RATE, _MOMENTUM, _DECAY = 0.1, 0.9, 1e-4
_MEAN, _STD = 0.5, 0.25


@dataclasses.dataclass(frozen=True)
class Switch:
    """A way to build or compile our step.

    Attributes:
      options: of ``create_model``; and dtype.
      flags: of XLA, added to those that are set.
    """

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    flags: str = ""


SWITCHES = {
    "default": Switch(),
    "pointwise": Switch({"conv_algorithm": "pointwise"}),
    "products": Switch({"conv_algorithm": "products"}),
    "remat": Switch({"remat": True}),
    "fused norm": Switch({"fused_norm": True}),
    "fast variance": Switch({"norm_variance": "fast"}),
    "fused, fast": Switch({"fused_norm": True, "norm_variance": "fast"}),
    "space to depth": Switch({"stem_form": "space_to_depth"}),
    "four channels": Switch({"stem_form": "four_channels"}),
    "float32": Switch({"dtype": "float32"}),
    "no graphs": Switch(flags="--xla_gpu_enable_command_buffer="),
    "graphs": Switch(flags="--xla_gpu_enable_command_buffer=+CONVOLUTION"),
    "conv fusion": Switch(flags="--xla_gpu_experimental_enable_conv_fusion=true"),
    "runtime fusion": Switch(flags="--xla_gpu_use_runtime_fusion=true"),
    "no autotuning": Switch(flags="--xla_gpu_autotune_level=0"),
    "fusion autotuner": Switch(
        flags="--xla_gpu_experimental_enable_fusion_autotuner=true"
    ),
}
"""By name; JAX's float32 lets products round their factors on a GPU (TF32)."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
      framework: of ``FRAMEWORKS``.
      model: the net.
      batch: images a step.
      way: ours: a key of ``SWITCHES``, "end to end" or "input alone"; torch: eager or
        compiled; flax: jitted.
      images: for the latter two of ours: folder of CLASS/IMAGE.
    """

    framework: str
    model: str
    batch: int
    way: str
    images: str | None = None

    @property
    def flags(self) -> str:
        """Of XLA."""
        return SWITCHES[self.way].flags if self.way in SWITCHES else ""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured: steps to warm up, seconds a window, and windows."""

    warm: int = 3
    window: float = 1.0
    windows: int = 5


TINY = Size(warm=1, window=0.01, windows=2)


@dataclasses.dataclass
class Running:
    """An implementation, ready to run.

    Attributes:
      run: does so many steps, waits for them, and stops at a loss that is not finite.
      facts: of the row.
      peak: bytes on the device at the fullest moment; None where it does not tell.
    """

    run: Callable[[int], None]
    facts: dict[str, Any]
    peak: Callable[[], int | None]


def plan(
    models: Sequence[str],
    batches: Sequence[int],
    frameworks: Sequence[str],
    switches: Sequence[str],
    images: str | None = None,
    compiled: bool = True,
) -> list[Case]:
    """The cases, in the order of what matters.

    Switches are compared, and images read, with the first net and batch.

    Args:
      models: of the catalog.
      batches: images a step.
      frameworks: of ``FRAMEWORKS``.
      switches: keys of ``SWITCHES`` beside "default".
      images: folder for the input pipeline.
      compiled: whether torch is compiled too.
    """
    ways = {
        "ours": ("default",),
        "torch": ("compiled", "eager") if compiled else ("eager",),
        "flax": ("jitted",),
    }
    cases = []
    for model in models:
        for batch in batches:
            cases += [
                Case(framework, model, batch, way)
                for framework in frameworks
                for way in ways[framework]
            ]
            if (model, batch) != (models[0], batches[0]) or "ours" not in frameworks:
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


def prepared(case: Case) -> Running:
    """Builds what the case measures; nothing is compiled yet."""
    if case.framework == "torch":
        return torch_running(case)
    if case.framework == "flax":
        return flax_running(case)
    return our_running(case) if case.way in SWITCHES else fed_running(case)


def our_running(case: Case) -> Running:
    """The library's step with a switch, and what XLA says of the program."""
    import jax

    from resnet_jax.analysis.complexity import count_parameters
    from resnet_jax.config.schema import AugmentationConfig
    from resnet_jax.models import catalog_entry
    from resnet_jax.training.benchmark import synthetic_step

    options = dict(SWITCHES[case.way].options)
    step, state, batch = synthetic_step(
        case.model,
        case.batch,
        catalog_entry(case.model).image_size,
        options.pop("dtype", "bfloat16"),
        AugmentationConfig(),
        devices=1,
        **options,
    )
    start = time.perf_counter()
    compiled = step.lower(state, None, batch).compile()
    facts = {
        "implementation": "resnet_jax",
        "parameters": count_parameters(state.params),
        "compile_seconds": time.perf_counter() - start,
        **_account(compiled, case.batch),
    }

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state = compiled(state, None, batch)
        jax.block_until_ready(state)
        _check(int(state.first_bad_step) < 0)

    return Running(run, facts, _jax_peak)


def _account(compiled: Any, batch: int) -> dict[str, Any]:
    """XLA's own sums for a program; None where a backend gives none."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    nbytes = (cost or {}).get("bytes accessed")
    return {
        "xla_bytes_an_image": None if nbytes is None else nbytes / batch,
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
    }


def fed_running(case: Case) -> Running:
    """The step on images that the pipeline reads, or the pipeline without a step."""
    import jax

    from resnet_jax import parallel
    from resnet_jax.config import resolve
    from resnet_jax.models import catalog_entry
    from resnet_jax.training.setup import prepare

    folder = Path(str(case.images)).resolve()
    config = resolve(
        {
            "model.name": case.model,
            "model.dtype": "bfloat16",
            "data.name": "images",
            "data.path": str(folder.parent),
            "data.train_split": f"{folder.name}[:90%]",
            "data.test_split": f"{folder.name}[90%:]",  # not read
            "data.image_size": catalog_entry(case.model).image_size,
            "data.normalization": "imagenet",
            "data.resident": False,
            "augmentation.crop_area": (0.08, 1.0),
            "augmentation.flip": True,
            "training.steps": 10**6,
            "training.global_batch_size": case.batch,
        }
    )
    setup = prepare(config, parallel.data_mesh(1))
    train = setup.dataset.train
    stream = setup.feed(train).training_batches(0, case.batch, config.seed)
    facts = {
        "implementation": "resnet_jax",
        "images": len(train),
        "classes": setup.dataset.num_classes,
        "threads": config.data.threads,
    }

    def read(steps: int) -> None:
        for _ in range(steps):
            jax.block_until_ready(next(stream))

    if case.way == "input alone":
        return Running(read, facts, _jax_peak)
    step, state = setup.train_step(), setup.fresh_state()

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state = step(state, None, next(stream))
        jax.block_until_ready(state)
        _check(int(state.first_bad_step) < 0)

    return Running(run, facts, _jax_peak)


def flax_running(case: Case) -> Running:
    """Flax's example's net; see benchmarks/train_step.py."""
    from benchmarks.train_step import Work, flax_contender
    from resnet_jax.data.transforms import PixelStatistics

    images, labels = synthetic(case)
    pixels = PixelStatistics(
        np.full((1, 1, 3), _MEAN, np.float32), np.full((1, 1, 3), _STD, np.float32)
    )
    work = Work(case.model, images, labels, pixels)
    contender = flax_contender(work, "bfloat16")

    def run(steps: int) -> None:
        contender.run(steps)
        _check(contender.is_finite())

    facts = {"implementation": "flax", "parameters": contender.parameters}
    return Running(run, facts, _jax_peak)


def torch_running(case: Case) -> Running:
    """Torch's step, eager or compiled."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    net, implementation = torch_net(case.model)
    net = net.to(device, memory_format=torch.channels_last).train()
    host_images, host_labels = synthetic(case)
    # (n, h, w, c) in memory, seen as (n, c, h, w): channels_last.
    images = torch.from_numpy(host_images).to(device).permute(0, 3, 1, 2)
    labels = torch.from_numpy(host_labels).long().to(device)
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=_RATE,
        momentum=_MOMENTUM,
        weight_decay=_DECAY,
        fused=device == "cuda",
    )

    def loss_of() -> Any:
        batch = (images.float() / 255 - _MEAN) / _STD
        with torch.autocast(device, torch.bfloat16):
            logits = net(batch)
        return functional.cross_entropy(logits.float(), labels)

    if case.way == "compiled":
        loss_of = torch.compile(loss_of)

    def run(steps: int) -> None:
        for _ in range(steps):
            loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _check(math.isfinite(loss.item()))  # which waits for the device

    facts = {
        "implementation": implementation,
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
    }

    def peak() -> int | None:
        return torch.cuda.max_memory_allocated() if device == "cuda" else None

    return Running(run, facts, peak)


def torch_net(model: str) -> tuple[Any, str]:
    """A net of torchvision or timm, else that of the peers, and whose it is."""
    for library, make in (
        ("torchvision", lambda found: getattr(found.models, model)()),
        ("timm", lambda found: found.create_model(model)),
    ):
        # One that does not fit the installed torch fails in other ways too.
        try:
            found = importlib.import_module(library)
            return make(found), f"{library} {found.__version__}"
        except (ImportError, AttributeError, RuntimeError):
            continue
    from benchmarks.peers import LAYOUTS
    from benchmarks.peers_torch import TorchResNet

    return TorchResNet(LAYOUTS[model]), "benchmarks/peers_torch.py"


def synthetic(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random images (n, h, w, 3) uint8 and labels (n,) int32."""
    from benchmarks.peers import LAYOUTS

    layout = LAYOUTS[case.model]
    rng = np.random.default_rng(0)
    shape = (case.batch, layout.image_size, layout.image_size, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    return images, rng.integers(0, layout.num_classes, case.batch).astype(np.int32)


def _check(finite: bool) -> None:
    if not finite:
        raise SystemExit("a loss was not finite")


def _jax_peak() -> int | None:
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def run_case(case: Case, size: Size) -> dict[str, Any]:
    """Measures a case in this process."""
    start = time.perf_counter()
    running = prepared(case)
    # The first step compiles; then caches are filled and algorithms chosen.
    running.run(1)
    ready = time.perf_counter() - start
    running.run(size.warm)
    start = time.perf_counter()
    running.run(size.warm)
    each = (time.perf_counter() - start) / size.warm
    steps = max(1, math.ceil(size.window / each))
    seconds = []
    for _ in range(size.windows):
        start = time.perf_counter()
        running.run(steps)
        seconds.append(time.perf_counter() - start)
    milliseconds = [1000 * window / steps for window in seconds]
    median = statistics.median(milliseconds)
    return {
        "status": "measured",
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
        f"training step, bfloat16, {content['environment']['devices']}; medians of "
        f"{size.windows} windows of {size.window} s\n"
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
