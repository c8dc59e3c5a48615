"""Memory of a training step on each device, its state replicated and cut.

    python -m benchmarks.sharded_memory --json FILE

The bytes are the compiler's own account of the compiled step, of one of so many
simulated devices of the CPU: of its arguments (the state and its part of the batch),
and of what it needs beside them. No step is run or timed. Arguments are the same on any
kind of device; the rest is a matter of the compiler, and other on an accelerator.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import record
from resnet_jax.training.benchmark import synthetic_step

FORMS: dict[str, dict[str, Any]] = {
    "replicated": {},
    "fully sharded": {"fully_sharded": True},
}


def measure(model: str, batch_size: int, image_size: int, form: str) -> dict[str, Any]:
    """Bytes a device of one form of the step."""
    train_step, state, batch = synthetic_step(
        model, batch_size, image_size, "float32", **FORMS[form]
    )
    memory: Any = train_step.lower(state, None, batch).compile().memory_analysis()
    return {
        "form": form,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the JSON."""
    options = _parse(arguments)
    jax.config.update("jax_num_cpu_devices", options.devices)
    content = record.circumstances("sharded_memory", arguments)
    print(
        f"{options.model}, global batch {options.batch}, {options.size} px, float32, "
        f"{options.devices} devices; MiB a device"
    )
    print(f"{'':<16}{'arguments':>10}{'temporary':>11}")
    rows = []
    for form in FORMS:
        row = measure(options.model, options.batch, options.size, form)
        rows.append(row)
        figures = (row["argument_bytes"] / 2**20, row["temporary_bytes"] / 2**20)
        print(f"{form:<16}{figures[0]:>10.1f}{figures[1]:>11.1f}", flush=True)
    record.write(
        options.json,
        content
        | {
            "model": options.model,
            "global_batch_size": options.batch,
            "image_size": options.size,
            "devices": options.devices,
            "rows": rows,
        },
    )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharded_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=record.positive, default=64, metavar="N")
    parser.add_argument("--size", type=record.positive, default=224, metavar="PIXELS")
    parser.add_argument("--devices", type=record.positive, default=8, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
