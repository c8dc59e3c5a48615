"""Training speed on small images that lie on one GPU, beside torch; within minutes.

    python -m benchmarks.gpu_small_images --out FOLDER
    python -m benchmarks.gpu_small_images --out FOLDER --tiny      # a trial on the CPU

The CIFAR nets of depths 20, 56 and 110, batches of 128, on 50,000 random uint8 images
of 32x32 that lie on the device; crops out of 4 pixels of padding, flips and the
normalisation are computed there too. Nothing is read from the host but where a run
stands, and torch's loop reads nothing either.

  jax    the training step, 1, 16 or 128 of them a call (a ``lax.scan`` that computes
         its batches' indices itself), 1 or 4 seeds by vmap, with sets of XLA's flags
  torch  the same net with projections (see benchmarks/peers.py), channels_last, eager
         and torch.compile(mode="reduce-overhead"), which makes CUDA graphs; fused SGD

``float32`` is float32 throughout, ``tf32`` lets products round their factors, and in
``bfloat16`` ours computes convolutions and maps in it and torch's autocast decides.

Each case is a process of its own, since XLA reads its flags once: what is compared does
not take turns, and rests on the GPU having nothing else to do. A case compiles and runs
a few windows; its figure is the median of theirs. The cases stand in the order of what
they matter; those that do not fit into the time are recorded as not measured. Flags
that this jaxlib does not know are found by trying.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import processes, record

FLAGS = {
    "default": "",
    "no graphs": "--xla_gpu_enable_command_buffer=",
    "graphs": "--xla_gpu_enable_command_buffer=+CONVOLUTION",
    "graphs, loops": "--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE",
}
"""Sets of XLA's flags, added to those that are set."""

PRECISIONS = ("float32", "tf32", "bfloat16")
_MATMUL = {"float32": "float32", "tf32": "tensorfloat32", "bfloat16": "bfloat16"}
_PAD = 4
_RATE, _MOMENTUM, _DECAY = 0.1, 0.9, 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
      framework: jax or torch.
      depth: of the net.
      precision: one of ``PRECISIONS``.
      flags: a key of ``FLAGS``; jax's alone.
      calls: jax: steps a call, each a row; torch: eager or compiled, each a row.
      seeds: jax: trained at once by vmap.
      options: jax: of ``create_model``, as pairs.
    """

    framework: str
    depth: int
    precision: str
    flags: str = "default"
    calls: tuple[Any, ...] = (1, 16, 128)
    seeds: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One for each of ``calls``, not measured yet."""
        fixed = dataclasses.asdict(self)
        del fixed["calls"]
        return [fixed | {"call": call, "status": "not measured"} for call in self.calls]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured: images on the device, batch, steps a window, windows."""

    num_images: int = 50_000
    batch: int = 128
    steps: int = 256
    windows: int = 5


TINY = Size(num_images=40, batch=4, steps=2, windows=1)


def cases(tiny: bool) -> list[Case]:
    """The plan, in the order of what matters."""
    if tiny:
        # No vmap: XLA compiles its grouped convolutions for minutes on a CPU.
        return [
            Case("jax", 8, "float32", calls=(1, 2)),
            Case("torch", 8, "float32", calls=("eager",)),
        ]
    torch_calls = ("eager", "compiled")
    plan = [Case("jax", 20, precision) for precision in reversed(PRECISIONS)]
    plan += [
        Case("torch", 20, precision, calls=torch_calls)
        for precision in reversed(PRECISIONS)
    ]
    plan += [
        Case("jax", 20, precision, flags, calls=(128,))
        for precision in ("bfloat16", "tf32")
        for flags in FLAGS
        if flags != "default"
    ]
    plan += [Case("jax", 20, "bfloat16", calls=(128,), seeds=4)]
    plan += [
        case
        for depth in (56, 110)
        for precision in ("bfloat16", "tf32")
        for case in (
            Case("jax", depth, precision, calls=(128,)),
            Case("torch", depth, precision, calls=("compiled",)),
        )
    ]
    return plan


def unknown_flags() -> set[str]:
    """The keys of ``FLAGS`` with which this jaxlib refuses to start."""
    return {name for name, flags in FLAGS.items() if not processes.knows(flags)}


def measure(case: Case, tiny: bool, seconds: float) -> list[dict[str, Any]]:
    """The rows of a case, measured in a process that is stopped after ``seconds``."""
    arguments = ["--case", json.dumps(dataclasses.asdict(case))]
    arguments += ["--tiny"] if tiny else []
    measured, fault = processes.run(
        "gpu_small_images", arguments, FLAGS[case.flags], seconds
    )
    rows = case.rows()
    for index, row in enumerate(rows):
        row.update(measured[index] if index < len(measured) else {"status": fault})
    return rows


def jax_runs(case: Case, size: Size) -> Iterator[tuple[Callable[[int], bool], int]]:
    """For each of the case's calls: a function that runs so many steps; parameters."""
    import jax

    jax.config.update("jax_default_matmul_precision", _MATMUL[case.precision])
    for length in case.calls:
        yield _jax_run(case, size, length)


def _jax_run(case: Case, size: Size, length: int) -> tuple[Callable[[int], bool], int]:
    import jax
    import jax.numpy as jnp

    from resnet_jax import create_model, parallel
    from resnet_jax.analysis.complexity import count_parameters
    from resnet_jax.config import Config, derive
    from resnet_jax.config.schema import AugmentationConfig, TrainingConfig
    from resnet_jax.data.device_order import Place
    from resnet_jax.data.order import Order
    from resnet_jax.data.transforms import PixelStatistics
    from resnet_jax.models import fused
    from resnet_jax.training.optimizer import make_optimizer
    from resnet_jax.training.schedule import Schedule
    from resnet_jax.training.state import init_state, state_shardings
    from resnet_jax.training.step import make_train_step, make_train_steps

    mesh = parallel.data_mesh(1)
    dtype = jnp.bfloat16 if case.precision == "bfloat16" else jnp.float32
    options = dict(case.options)
    fused.RECOMPUTES_MASK = options.get("fused_norm", False)
    net = create_model(f"cifar_resnet{case.depth}", dtype=dtype, **options)
    config = dataclasses.replace(
        Config(),
        augmentation=AugmentationConfig(pad=_PAD, flip=True),
        training=TrainingConfig(steps=10**6, global_batch_size=size.batch),
    )
    derived = derive(config, size.num_images)
    schedule = Schedule(config.optimizer, config.schedule, derived)
    optimizer = make_optimizer(config.optimizer)
    images, labels = synthetic(size)
    pixels = PixelStatistics(
        np.full((32, 32, 3), 0.5, np.float32), np.ones((32, 32, 3), np.float32)
    )

    def init(seed):
        state = init_state(
            net, optimizer, schedule, pixels, (32, 32, 3), 0, averaged=False
        )
        return dataclasses.replace(state, rng=jax.random.key(seed))

    shardings = state_shardings(jax.eval_shape(init, 0), mesh, False)
    parts = (net, optimizer, schedule, config, mesh, shardings)
    resident = parallel.place(
        {"image": images, "label": labels}, parallel.replicated(mesh)
    )
    order = Order.of(size.num_images, seed=0)
    seeds = np.arange(case.seeds, dtype=np.uint32)
    state = jax.jit(jax.vmap(init))(seeds)
    parameters = count_parameters(jax.tree.map(lambda leaf: leaf[0], state.params))
    if length == 1:
        program = make_train_step(*parts)
        argument: Any = {"index": jnp.arange(size.batch)}
    else:
        program = make_train_steps(*parts, order, length)
        argument = Place(seeds[0], np.int32(0), np.int32(0))
    if case.seeds > 1:
        argument = jax.tree.map(lambda leaf: jnp.stack([leaf] * case.seeds), argument)
        if length > 1:
            argument = argument._replace(seed=jnp.asarray(seeds))
        program = jax.jit(jax.vmap(program, in_axes=(0, None, 0)), donate_argnums=0)
    else:
        state = jax.tree.map(lambda leaf: leaf[0], state)

    def run(steps: int) -> bool:
        nonlocal state
        for _ in range(-(-steps // length)):
            state = program(state, resident, argument)
        jax.block_until_ready(state)
        return bool((np.asarray(state.first_bad_step) < 0).all())

    return run, parameters


def synthetic(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Random images (n, 32, 32, 3) uint8 and labels (n,) int32."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size.num_images, 32, 32, 3), dtype=np.uint8)
    return images, rng.integers(0, 10, size.num_images).astype(np.int32)


def torch_runs(case: Case, size: Size) -> Iterator[tuple[Callable[[int], bool], int]]:
    """As ``jax_runs``."""
    for call in case.calls:
        yield _torch_run(case, size, call == "compiled")


def _torch_run(
    case: Case, size: Size, compiled: bool
) -> tuple[Callable[[int], bool], int]:
    import torch
    from torch.nn import functional

    from benchmarks.peers import Layout
    from benchmarks.peers_torch import TorchResNet

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tf32 = case.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    layout = Layout((case.depth // 6,) * 3, cifar=True)
    net = TorchResNet(layout).to(device)
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(
                memory_format=torch.channels_last
            )
    host_images, host_labels = synthetic(size)
    images = torch.from_numpy(host_images).to(device)
    labels = torch.from_numpy(host_labels).long().to(device)
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=_RATE,
        momentum=_MOMENTUM,
        weight_decay=_DECAY,
        fused=device == "cuda",
    )
    side = torch.arange(32, device=device)
    places = torch.arange(size.batch, device=device)[:, None, None]

    def augmented(indices: Any) -> Any:
        """A batch (n, 3, 32, 32), channels last: normalised, flipped and cropped."""
        batch = images[indices].float() / 255 - 0.5
        mirrored = torch.rand(size.batch, 1, 1, 1, device=device) < 0.5
        batch = torch.where(mirrored, batch.flip(2), batch)
        padded = functional.pad(batch, (0, 0, _PAD, _PAD, _PAD, _PAD))
        corners = torch.randint(0, 2 * _PAD + 1, (2, size.batch, 1), device=device)
        rows, columns = (corner + side for corner in corners)
        cropped = padded[places, rows[:, :, None], columns[:, None, :]]
        return cropped.permute(0, 3, 1, 2)

    def loss_of(indices: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, case.precision == "bfloat16"):
            logits = net(augmented(indices))
        return functional.cross_entropy(logits.float(), labels[indices])

    if compiled:
        loss_of = torch.compile(loss_of, mode="reduce-overhead")
    order = torch.randperm(size.num_images, device=device)
    batches = order[: size.num_images // size.batch * size.batch].split(size.batch)

    def run(steps: int) -> bool:
        for step in range(steps):
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            loss = loss_of(batches[step % len(batches)])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return bool(np.isfinite(loss.item()))  # which waits for the device

    return run, sum(parameter.numel() for parameter in net.parameters())


def run_case(case: Case, size: Size) -> None:
    """Prints a line of JSON for each of the case's calls."""
    runs = jax_runs if case.framework == "jax" else torch_runs
    for run, parameters in runs(case, size):
        start = time.perf_counter()
        # The first compiles; then caches are filled and graphs recorded.
        finite = run(1)
        first = time.perf_counter() - start
        run(size.steps)
        seconds = []
        for _ in range(size.windows):
            start = time.perf_counter()
            finite &= run(size.steps)
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds) / size.steps
        row = {
            "status": "measured",
            "finite": finite,
            "parameters": parameters,
            "first_call_seconds": first,
            "milliseconds": 1000 * median,
            "images_per_second": case.seeds * size.batch / median,
            "window_seconds": seconds,
        }
        print(json.dumps(row), flush=True)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a line a row."""
    for row in rows:
        what = (
            f"{row['framework']:<6}{row['depth']:>4}  {row['precision']:<9}"
            f"{row['flags']:<14}{row['call']!s:>9}{row['seeds']:>6}"
        )
        figures = row["status"]
        if figures == "measured":
            figures = (
                f"{row['milliseconds']:>9.3f}{row['images_per_second']:>12,.0f}"
                f"{row['first_call_seconds']:>8.1f}"
            )
        print(f"{what}  {figures}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Measures all cases that fit into the time and writes the JSON after each."""
    options = _parse(arguments)
    size = TINY if options.tiny else Size()
    if options.case is not None:
        fields = json.loads(options.case)
        run_case(Case(**fields | {"calls": tuple(fields["calls"])}), size)
        return
    if options.out is None:
        raise SystemExit("needs --out FOLDER")
    end = time.monotonic() + 60 * options.minutes
    # This process names the device, and must not take its memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    content = record.circumstances("gpu_small_images", arguments)
    plan = cases(options.tiny)
    unknown = unknown_flags() if not options.tiny else set()
    print(
        f"{content['environment']['devices']}, batch {size.batch}; medians of "
        f"{size.windows} windows of {size.steps} steps\n"
        f"{'':<6}{'net':>4}  {'':<9}{'flags':<14}{'call':>9}{'seeds':>6}"
        f"  {'ms/step':>9}{'images/s':>12}{'first s':>8}"
    )
    rows: list[dict[str, Any]] = []
    for case in plan:
        left = end - time.monotonic()
        if case.flags in unknown:
            status = "not measured: flags unknown to this jaxlib"
            new = [row | {"status": status} for row in case.rows()]
        elif left < 1:
            status = "not measured: out of time"
            new = [row | {"status": status} for row in case.rows()]
        else:
            new = measure(case, options.tiny, left)
        rows += new
        print_rows(new)
        result = {**dataclasses.asdict(size), "flags": FLAGS, "rows": rows}
        record.write(f"{options.out}/gpu_small_images.json", content | result)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_small_images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", metavar="FOLDER", help="for the result")
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="for all cases (default: 7.5)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a trial of few and small cases"
    )
    parser.add_argument("--case", metavar="JSON", help="one case, by the script itself")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
