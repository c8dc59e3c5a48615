"""The plan's memory of a training step beside what XLA's compiler reports on the CPU.

    python -m benchmarks.plan_memory --json benchmarks/results/plan_memory.json

Each step is compiled and not run. XLA's figure is the sum of its arguments, results
and temporaries, less the results that lie where donated arguments lay; the plan's is
that of its rules for XLA:CPU (``resnet_jax/planning/memory.py``), from the traced step
alone. Both are of the same net, batch and choice of convolutions.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import record
from resnet_jax.config import Config, resolve
from resnet_jax.planning.datasets import paper_dataset
from resnet_jax.planning.memory import XLA_CPU
from resnet_jax.planning.steps import trace_step, tree_bytes

CASES: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("cifar_resnet20", 128, 32, {}),
    ("cifar_resnet20", 128, 32, {"conv_algorithm": "xla"}),
    ("cifar_resnet56", 16, 32, {}),
    ("cifar_resnet56", 16, 32, {"conv_algorithm": "xla"}),
    ("cifar_wide_resnet28_10", 4, 32, {}),
    ("resnet18", 4, 224, {}),
    ("resnet18", 8, 224, {"conv_algorithm": "xla"}),
    ("resnet50", 8, 64, {}),
    ("resnet50", 8, 64, {"remat": True}),
    ("resnet50", 16, 64, {"conv_algorithm": "xla"}),
    ("resnet50", 4, 224, {}),
    ("resnet50", 4, 224, {"conv_algorithm": "xla"}),
    ("resnet18", 8, 64, {}),
    ("resnext50_32x4d", 4, 64, {}),
    ("vgg16", 2, 64, {}),
    ("cifar_highway19", 16, 32, {}),
    ("cifar_resnet110", 32, 32, {"scan": True, "conv_algorithm": "xla"}),
    ("cifar_resnet56", 32, 32, {"scan": True}),
    ("cifar_resnet56", 32, 32, {"scan": True, "remat": True}),
    ("resnet50", 4, 224, {"dtype": "bfloat16"}),
)
"""Net, batch, side of the images and fields of ``config.model``."""


def compare(name: str, batch: int, side: int, options: dict[str, Any]) -> dict:
    """Bytes by the plan and by the compiler, and the seconds that each took."""
    start = time.perf_counter()
    config = case_config(name, batch, side, options)
    dataset = paper_dataset(config, 10 * batch, 10, side)
    step = trace_step(config, dataset, compiler=XLA_CPU)
    given = tree_bytes((step.state, step.batch))
    planned = given + step.memory.peak().nbytes
    middle = time.perf_counter()
    analysis = step.traced.lower().compile().memory_analysis()
    reported = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )
    return {
        "model": name,
        "batch_size": batch,
        "image_size": side,
        "options": options,
        "planned_bytes": planned,
        "compiler_bytes": reported,
        "compiler_temporaries": analysis.temp_size_in_bytes,
        "ratio": planned / reported,
        "trace_seconds": middle - start,
        "compile_seconds": time.perf_counter() - middle,
    }


def case_config(name: str, batch: int, side: int, options: dict[str, Any]) -> Config:
    """A config of the net, streamed images and the paper's optimizer."""
    config = resolve({"training.steps": 1, "training.global_batch_size": batch})
    model = dataclasses.replace(config.model, name=name, **options)
    data = dataclasses.replace(
        config.data, image_size=side, resident=False, normalization="imagenet"
    )
    augmentation = dataclasses.replace(config.augmentation, flip=True)
    return dataclasses.replace(
        config, model=model, data=data, augmentation=augmentation
    )


def main(arguments: Sequence[str]) -> None:
    """Compares, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    options = parser.parse_args(arguments)
    content = record.circumstances("plan_memory", arguments)
    print(f"{'net':<24}{'batch':>6}{'px':>5}{'plan':>10}{'XLA':>10}{'ratio':>7}")
    rows = []
    for case in CASES:
        row = compare(*case)
        rows.append(row)
        print(
            f"{row['model']:<24}{row['batch_size']:>6}{row['image_size']:>5}"
            f"{row['planned_bytes'] / 2**20:>10.1f}"
            f"{row['compiler_bytes'] / 2**20:>10.1f}{row['ratio']:>7.3f}"
            f"  {row['options'] or ''}",
            flush=True,
        )
    record.write(options.json, content | {"rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
