"""Side by side on one machine: contenders take turns in one process.

    python -m benchmarks.compare train_step --model resnet50 --json FILE
    python -m benchmarks.compare forward_backward --model cifar_resnet20
    python -m benchmarks.compare inference --model resnet50 --json FILE
    python -m benchmarks.compare options --forms fused_norm=false remat=true
    python -m benchmarks.compare loop

  train_step        our step, Flax's example's, torch's (eager)
  forward_backward  the same nets without the update; ours also with
                    conv_algorithm="xla"; on a GPU also torch compiled
  inference         the forward pass of the same nets; ours with batch normalisation
                    folded into the convolutions, and without; torch's folded
  options           our step with options of the net: by default fused_norm=false, and
                    conv_algorithm=xla
  loop              the whole training loop on the digits, and its bare jitted step

A turn is one step that is not timed and then --steps timed steps. Ratios are medians of
the rounds' ratios, so a slow drift of the machine cancels. On a GPU set
XLA_PYTHON_CLIENT_PREALLOCATE=false, so that JAX leaves memory for torch.
"""

import argparse
import dataclasses
import importlib.util
import io
import itertools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from benchmarks import contenders, peers, record
from benchmarks.contenders import OURS, Contender
from resnet_jax import parallel
from resnet_jax.config import Config, load_config
from resnet_jax.data.dataset import open_dataset
from resnet_jax.data.feeds import ResidentFeed, make_feed
from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.training.step import call_length, make_train_step, make_train_steps
from resnet_jax.training.train import learner_for, steps_per_call, train

BATCHES = {"resnet18": 16, "resnet34": 16, "resnet50": 8, "resnet101": 8}
"""Images per step, for a CPU; other nets take 128."""

FORMS = ("fused_norm=false", "conv_algorithm=xla")
DIGITS = Path(__file__).parent.parent / "configs" / "digits.py"
Times = dict[str, list[float]]


def train_step(options: argparse.Namespace) -> Times:
    """The three training steps."""
    model, batch, dtype = options.model, options.batch, options.dtype
    entered = [
        contenders.our_step(model, batch, dtype),
        contenders.flax_step(model, batch, dtype),
        *_torch(options, updates=True),
    ]
    return take_turns(entered, options)


def forward_backward(options: argparse.Namespace) -> Times:
    """Loss and gradients of the three nets."""
    model, batch, dtype = options.model, options.batch, jnp.dtype(options.dtype)
    nets: dict[str, tuple[Any, str]] = {
        OURS: (create_model(model, dtype=dtype), "resnet_jax"),
        f"{OURS}_xla": (
            create_model(model, dtype=dtype, conv_algorithm="xla"),
            "resnet_jax",
        ),
        "flax_example": (
            peers.FlaxResNet(peers.LAYOUTS[model], dtype=dtype),
            "benchmarks/peers.py",
        ),
    }
    entered = [
        contenders.jax_gradient(name, net, model, batch, source)
        for name, (net, source) in nets.items()
    ]
    return take_turns([*entered, *_torch(options, updates=False)], options)


def inference(options: argparse.Namespace) -> Times:
    """The forward pass of the three nets on uint8 images."""
    model, batch, dtype = options.model, options.batch, options.dtype
    entered = [
        contenders.our_inference(model, batch, folded=True, dtype=dtype),
        contenders.our_inference(model, batch, False, f"{OURS}_unfolded", dtype),
        contenders.flax_inference(model, batch, dtype),
    ]
    if _has_torch():
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        entered += [
            contenders.torch_inference(
                model, batch, device, False, name, dtype, channels_last
            )
            for name, channels_last in (("torch", False), ("torch_channels_last", True))
        ]
    return take_turns(entered, options)


def net_options(options: argparse.Namespace) -> Times:
    """Our step with other options of the net."""
    entered = [contenders.our_step(options.model, options.batch, options.dtype)]
    for form in options.forms:
        chosen = contenders.parse_options(form)
        entered.append(
            contenders.our_step(
                options.model, options.batch, options.dtype, form, **chosen
            )
        )
    return take_turns(entered, options)


def _has_torch() -> bool:
    found = importlib.util.find_spec("torch") is not None
    if not found:
        print("torch is not installed")
    return found


def _torch(options: argparse.Namespace, updates: bool) -> list[Contender]:
    if not _has_torch():
        return []
    on_gpu = jax.default_backend() == "gpu"
    forms: dict[str, dict[str, bool]] = {
        "torch": {"channels_last": False},
        "torch_channels_last": {},
        "torch_compiled": {"compiled": True},
    }
    if not on_gpu:
        del forms["torch_compiled"]
    return [
        contenders.torch_step(
            options.model,
            options.batch,
            options.dtype,
            name=name,
            device="cuda" if on_gpu else "cpu",
            updates=updates,
            **form,
        )
        for name, form in forms.items()
    ]


def take_turns(entered: Sequence[Contender], options: argparse.Namespace) -> Times:
    """Milliseconds per step of every round, by name; notes facts in ``options``."""
    options.facts = {contender.name: dict(contender.facts) for contender in entered}
    for contender in entered:
        # The first step compiles; the second finds all caches filled.
        contender.run(2)
    times: Times = {contender.name: [] for contender in entered}
    for _ in range(options.rounds):
        for contender in entered:
            contender.run(1)
            start = time.perf_counter()
            finite = contender.run(options.steps)
            seconds = time.perf_counter() - start
            times[contender.name].append(1000 * seconds / options.steps)
            options.facts[contender.name]["finite"] = finite
    return times


def loop(options: argparse.Namespace) -> Times:
    """The training loop in windows, the bare step before and after each.

    Both run the same program on the same resident data. The loop also draws the order,
    sends indices, writes rows and prints; a row ends each window. Left out: the first
    window, which compiles, and the last row with its evaluation and checkpoint.
    """
    window = options.steps
    overrides = {
        "model.name": options.model,
        "training.log_every_steps": str(window),
        "training.global_batch_size": str(options.batch),
    }
    if options.data_dir:
        overrides["data.data_dir"] = options.data_dir
    config = load_config(str(DIGITS), overrides)
    steps = (options.rounds + 2) * window
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, steps=steps, epochs=None),
        evaluation=dataclasses.replace(config.evaluation, every_steps=steps),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=steps),
    )
    bare = bare_step(config)
    bare(window)
    turns = Turns(bare, window, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", rich.console.Console(file=turns, width=200))
    around = [(a + b) / 2 for a, b in itertools.pairwise(turns.bare)]
    options.facts = {"bare_step": {}, "train": {}}
    return {
        "bare_step": [1000 * seconds / window for seconds in around],
        "train": [1000 * seconds / window for seconds in turns.loop],
    }


def bare_step(config: Config) -> Callable[[int], float]:
    """A function of a number of steps: seconds that the jitted step takes for them."""
    dataset = open_dataset(config)
    mesh = parallel.data_mesh()
    learner = learner_for(config, dataset, mesh)
    feed = make_feed(dataset.train, mesh, config.data, config.augmentation)
    assert isinstance(feed, ResidentFeed), "the loop is compared on resident data"
    size, most = (
        config.training.global_batch_size,
        steps_per_call(config, dataset, mesh),
    )
    one_step, many_steps = make_train_step(learner), make_train_steps(learner)
    batch = next(feed.training_batches(0, size, config.seed))
    state = learner.fresh_state(dataset.train.statistics())

    def seconds(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        while steps:
            length = call_length(steps, most)
            if most == 1:
                state = one_step(state, feed.resident, batch)
            else:
                indices = feed.training_indices(0, length, size, config.seed)
                state = many_steps(state, feed.resident, indices)
            steps -= length
        jax.block_until_ready(state)
        return time.perf_counter() - start

    return seconds


class Turns(io.StringIO):
    """The loop's console: the row that ends a window gives the bare step its turn.

    Attributes:
      loop: seconds of each window.
      bare: the same for the bare step, before, between and after the loop's windows.
    """

    def __init__(self, bare: Callable[[int], float], window: int, windows: int):
        super().__init__()
        self.loop: list[float] = []
        self.bare: list[float] = []
        self._seconds, self._window, self._windows = bare, window, windows
        self._began = 0.0

    def write(self, text: str) -> int:
        """Takes the time if ``text`` is the row of a window's last step."""
        now = time.perf_counter()
        row = re.match(r"step (\d+)/", text)
        due = len(self.bare) <= self._windows
        if due and row and int(row[1]) == self._window * (len(self.bare) + 1):
            if self.bare:
                self.loop.append(now - self._began)
            self.bare.append(self._seconds(self._window))
            self._began = time.perf_counter()
        return super().write(text)


def summarize(times: Times, batch: int) -> list[dict[str, Any]]:
    """A row for each contender; the first is the one the others are compared with.

    ``time_ratio`` is the median, over rounds, of its time over the first one's, with
    the interval of 95 % of the medians of resampled ratios (bootstrap).
    """
    first = next(iter(times.values()))
    rows = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, first, strict=True)]
        median = statistics.median(own)
        rows.append(
            {
                "name": name,
                "milliseconds": median,
                "milliseconds_min": min(own),
                "milliseconds_max": max(own),
                "images_per_second": 1000 * batch / median,
                "time_ratio": statistics.median(ratios),
                "time_ratio_interval_95": median_interval(ratios),
                "milliseconds_of_rounds": own,
            }
        )
    return rows


def median_interval(values: Sequence[float], samples: int = 10_000) -> list[float]:
    """The middle 95 % of the medians of resampled values (bootstrap)."""
    drawn = np.random.default_rng(0).choice(values, (samples, len(values)))
    return np.percentile(np.median(drawn, axis=1), (2.5, 97.5)).tolist()


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints one line per contender."""
    print(
        f"{'':<22}{'parameters':>12}{'ms/step':>10}  {'(min .. max)':<22}"
        f"{'images/s':>10}{'time ratio':>12}"
    )
    for row in rows:
        spread = f"({row['milliseconds_min']:.1f} .. {row['milliseconds_max']:.1f})"
        print(
            f"{row['name']:<22}{row.get('parameters', 0) or '':>12}"
            f"{row['milliseconds']:>10.1f}  {spread:<22}"
            f"{row['images_per_second']:>10,.1f}{row['time_ratio']:>12.3f}"
            f"{'' if row.get('finite', True) else '  loss not finite'}"
        )


CASES = {
    "train_step": train_step,
    "forward_backward": forward_backward,
    "inference": inference,
    "options": net_options,
    "loop": loop,
}


def main(arguments: Sequence[str]) -> None:
    """Measures a case, prints the table and writes the JSON."""
    options = _parse(arguments)
    if jax.device_count() != 1:
        raise UserError(f"needs one device, not {jax.device_count()}")
    content = record.circumstances("compare", arguments)
    times = CASES[options.case](options)
    rows = summarize(times, options.batch)
    for row in rows:
        row.update(options.facts[row["name"]])
    environment = content["environment"]
    print(
        f"{options.case}: {options.model}, batch {options.batch}, {options.dtype}; "
        f"{environment['devices']}, {environment['cpu']}, {environment['cpu_cores']} "
        f"cores\nmedians of {options.rounds} rounds of {options.steps} steps"
    )
    print_table(rows)
    content |= {
        "case": options.case,
        "model": options.model,
        "batch_size": options.batch,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "steps_a_round": options.steps,
        "contenders": rows,
    }
    record.write(options.json, content)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = record.positive
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--model", default="cifar_resnet20", choices=peers.LAYOUTS)
    parser.add_argument("--batch", type=count, metavar="N", help="default: by the net")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=count, default=9, metavar="N")
    parser.add_argument("--steps", type=count, default=10, metavar="N", help="a turn")
    parser.add_argument(
        "--forms",
        nargs="+",
        default=FORMS,
        metavar="OPTION=VALUE,...",
        help="of options",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="of the digits, for loop")
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    options = parser.parse_args(arguments)
    options.batch = options.batch or BATCHES.get(options.model, 128)
    return options


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
