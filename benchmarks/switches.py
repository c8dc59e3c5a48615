"""Our training step with and without its switches, in one process.

    python -m benchmarks.switches --model cifar_resnet20 --json FILE
        --compare "fused norm=fused_norm:true" --compare "fast=norm_variance:fast"

The step of benchmarks/train_step.py, with the options of ``create_model`` that each
switch names. The forms take turns; a ratio is a form's time over that of the step
without switches, the median of the rounds' ratios. On a GPU, where XLA reads flags once
a process, ``gpu_training.py --switches`` measures the same.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import record
from benchmarks.contest import BATCH_SIZES, add_options, hold
from benchmarks.train_step import our_contender
from resnet_jax.errors import UserError, nearest
from resnet_jax.models import create_model


def parse_switch(text: str) -> tuple[str, dict[str, Any]]:
    """A name and options, from NAME=OPTION:VALUE,OPTION:VALUE; values as in JSON.

    Raises:
      UserError: it has another form, or there is no such option.
    """
    name, _, rest = text.partition("=")
    pairs = [pair.partition(":") for pair in rest.split(",") if pair]
    if not (name and pairs and all(key and value for key, _, value in pairs)):
        raise UserError(
            f"{text!r} is no switch; it has the form NAME=OPTION:VALUE,OPTION:VALUE"
        )
    valid = list(inspect.signature(create_model).parameters)
    valid += ["batch", "image_size", "folded"]
    for key, _, _ in pairs:
        if key not in valid:
            raise UserError(f"there is no option {key}; {nearest(key, valid)}")
    return name, {key: _value(value) for key, _, value in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the JSON."""
    options = _parse(arguments)
    options.batch = options.batch or BATCH_SIZES[options.model]
    content = record.circumstances("switches", arguments)
    switches = dict(parse_switch(text) for text in options.compare)
    content["switches"] = switches
    model, batch, dtype = options.model, options.batch, options.dtype
    plain, _ = our_contender(model, batch, dtype=dtype)
    switched = [
        our_contender(model, batch, name, dtype, **chosen)[0]
        for name, chosen in switches.items()
    ]
    hold(content, options, "training step", dtype, [plain, *switched], [])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.switches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, model="cifar_resnet20", steps=10)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--compare",
        action="append",
        required=True,
        metavar="NAME=OPTION:VALUE,...",
        help="a form with other options of create_model; may be given again",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
