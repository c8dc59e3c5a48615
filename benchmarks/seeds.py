"""Several seeds at once: their steps in one program by vmap, and one after another.

    python -m benchmarks.seeds --json FILE

One vmapped step advances k stacked states, each with its own random key and batch; the
other way is k calls of the training step. Both do the same work. What vmap makes of a
convolution whose kernels differ from seed to seed depends on its form
(``model.conv_algorithm``): XLA's own becomes a grouped convolution, the matrix products
become batched ones. So each form is measured; ``auto`` is what a run takes.

The contenders take turns, all forms and numbers of seeds, and a turn advances all of
its seeds. Ratios are medians of the rounds' ratios. Images are random, and augmented as
the paper's.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import record
from benchmarks.contest import Contender, measure
from resnet_jax.models.conv import ALGORITHMS
from resnet_jax.training.benchmark import synthetic_step
from resnet_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured, beside the form and the number of seeds.

    Attributes:
      model: the net's name.
      batch_size: of each seed.
      image_size: side of the images.
      dtype: of the convolutions.
    """

    model: str
    batch_size: int
    image_size: int
    dtype: str


def contender(work: Work, algorithm: str, seeds: int, vmapped: bool) -> Contender:
    """So many seeds, one way or the other."""
    train_step, state, batch = synthetic_step(
        work.model,
        work.batch_size,
        work.image_size,
        work.dtype,
        conv_algorithm=algorithm,
    )
    step: Any
    if vmapped:
        step = jax.jit(jax.vmap(train_step, in_axes=(0, None, 0)), donate_argnums=0)
        states = [stacked(state, seeds)]
        batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), batch)
    else:
        step = train_step
        states = [alone(state, seed) for seed in range(seeds)]

    def run(steps: int) -> None:
        for _ in range(steps):
            for index, state in enumerate(states):
                states[index] = step(state, None, batch)
        jax.block_until_ready(states)

    return Contender(
        name(algorithm, seeds, vmapped),
        parameters=0,
        multiply_adds=0,
        run=run,
        is_finite=lambda: all(bool((s.first_bad_step < 0).all()) for s in states),
    )


def name(algorithm: str, seeds: int, vmapped: bool) -> str:
    """Of a contender."""
    return f"{algorithm}, {seeds}, {'vmap' if vmapped else 'one after another'}"


def alone(state: TrainState, seed: int) -> TrainState:
    """A copy of a state with the key of a seed."""
    return dataclasses.replace(jax.tree.map(jnp.copy, state), rng=jax.random.key(seed))


def stacked(state: TrainState, seeds: int) -> TrainState:
    """The states of all seeds, along a new first axis of every leaf."""
    states = [alone(state, seed) for seed in range(seeds)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def rows_of(
    milliseconds: dict[str, list[float]],
    algorithms: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
) -> list[dict[str, Any]]:
    """A row for each form and number of seeds; ratios above 1: vmap is faster."""
    rows = []
    for algorithm in algorithms:
        for count in seeds:
            one = milliseconds[name(algorithm, count, False)]
            many = milliseconds[name(algorithm, count, True)]
            pairs = zip(one, many, strict=True)
            row = {
                "conv_algorithm": algorithm,
                "seeds": count,
                "milliseconds_one_after_another": statistics.median(one),
                "milliseconds_vmap": statistics.median(many),
                "speedup_of_vmap": statistics.median(a / b for a, b in pairs),
                "images_per_second_vmap": 1000
                * count
                * batch_size
                / statistics.median(many),
                "milliseconds_of_rounds": {"one_after_another": one, "vmap": many},
            }
            rows.append(row)
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a line a form and number of seeds."""
    print(
        f"{'form':<12}{'seeds':>6}{'ms, one by one':>16}{'ms, vmap':>12}{'speedup':>9}"
    )
    for row in rows:
        print(
            f"{row['conv_algorithm']:<12}{row['seeds']:>6}"
            f"{row['milliseconds_one_after_another']:>16.2f}"
            f"{row['milliseconds_vmap']:>12.2f}{row['speedup_of_vmap']:>9.2f}"
        )


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the JSON."""
    options = _parse(arguments)
    if jax.device_count() != 1:
        raise SystemExit(f"needs one device, not {jax.device_count()}")
    content = record.circumstances("seeds", arguments)
    work = Work(options.model, options.batch, options.size, options.dtype)
    contenders = [
        contender(work, algorithm, count, vmapped)
        for algorithm in options.algorithms
        for count in options.seeds
        for vmapped in (False, True)
    ]
    milliseconds = measure(contenders, options.rounds, options.steps)
    for one in contenders:
        if not one.is_finite():
            raise SystemExit(f"{one.name}: a loss was not finite")
    rows = rows_of(milliseconds, options.algorithms, options.seeds, options.batch)
    environment = content["environment"]
    print(
        f"{work.model}, batch {work.batch_size} a seed, {work.image_size} px, "
        f"{work.dtype}; {environment['devices']}, {environment['cpu']}, "
        f"{environment['cpu_cores']} cores\n"
        f"a step of all seeds, medians of {options.rounds} rounds of {options.steps}"
    )
    print_table(rows)
    result = dataclasses.asdict(work) | {
        "rounds": options.rounds,
        "steps_a_round": options.steps,
        "rows": rows,
    }
    record.write(options.json, content | result)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.seeds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--algorithms",
        nargs="+",
        default=["auto", "xla", "products"],
        choices=ALGORITHMS,
    )
    counts = {
        "batch": (128, "examples of each seed"),
        "size": (32, "side of the images"),
        "rounds": (7, "turns of each contender"),
        "steps": (5, "timed steps a turn"),
    }
    for option, (default, meaning) in counts.items():
        parser.add_argument(
            f"--{option}",
            type=record.positive,
            default=default,
            metavar="N",
            help=f"{meaning} (default: {default})",
        )
    parser.add_argument(
        "--seeds", type=record.positive, nargs="+", default=[2, 4], metavar="K"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
