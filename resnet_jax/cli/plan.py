"""``resnet-jax plan``."""

import argparse
import os
from typing import Any

from resnet_jax.cli.arguments import (
    MOST_CLASSES,
    MOST_COUNT,
    output_file,
    positive,
    whole,
)
from resnet_jax.cli.overrides import CONFIG, parse_overrides
from resnet_jax.config.schema import MOST_EXAMPLES, MOST_PIXELS

_DESCRIPTION = """Plan a training run on paper: steps, memory, work and input rate.

  resnet-jax plan --config imagenet:resnet50,goyal2017 \\
      --devices 256 --hosts 32 --chip tpu_v5e --config.model.dtype=bfloat16
  resnet-jax plan --config imagenet:resnet50 --compile tpu:v5e:4x4

Needs no accelerator and no data. The first form answers at once, by arithmetic. With
--compile, XLA also compiles the training step for the chip, and its figures follow.
--config.FIELD=VALUE overrides any field.
"""

# libtpu looks for a TPU host's metadata unless these are set.
_NO_TPU_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

_OPTIONS = (
    *("devices", "hosts", "chips", "rate", "images_per_core"),
    *("examples", "classes", "image_size", "target"),
)
"""Options that ``plan`` takes under the same name."""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "plan",
        help="steps, memory, work and input rate of a run, on paper",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="NAME|FILE.py[:ARG]", help=CONFIG)
    add(
        "--compile",
        metavar="TARGET",
        dest="target",
        help="compile the step for cpu, h100, h200 or a slice such as tpu:v5e:4x4",
    )
    count, rate = whole(1, MOST_COUNT), positive(1e15)
    add("--devices", type=count, metavar="N", help="devices of a batch (default: 1)")
    add("--hosts", type=count, metavar="N", help="hosts of these (default: 1)")
    add(
        "--chip",
        nargs="+",
        default=[],
        metavar="NAME",
        dest="chips",
        help="chips of the roofline, such as tpu_v5e or h200_sxm (default: all)",
    )
    add("--rate", type=rate, metavar="N", help="images per second, in all")
    add(
        "--images-per-core",
        type=rate,
        default=633.0,
        metavar="N",
        help="images per second that one core loads, as `resnet-jax benchmark input` "
        "measures (default: 633, see docs/plan.md)",
    )
    for name, most, metavar, text in (
        ("--examples", MOST_EXAMPLES, "N", "of a data set that is not known"),
        ("--classes", MOST_CLASSES, "K", "classes of such a set"),
        ("--image-size", MOST_PIXELS, "PIXELS", "side of its images"),
    ):
        add(name, type=whole(1, most), metavar=metavar, help=text)
    add("--json", type=output_file, metavar="FILE", help="also write the plan here")
    parser.set_defaults(run=_run, takes_overrides=True)


def _run(options: argparse.Namespace) -> None:
    for name, value in _NO_TPU_HOST.items():
        os.environ.setdefault(name, value)
    import jax
    import rich.console

    from resnet_jax.config import load_config
    from resnet_jax.plan import plan, print_plan
    from resnet_jax.training.benchmark import write_text

    # A plan computes nothing on devices, and must not wait for or occupy one.
    jax.config.update("jax_platforms", "cpu")
    console = rich.console.Console()
    run = plan(
        load_config(options.config, parse_overrides(options.rest)),
        **{name: getattr(options, name) for name in _OPTIONS},
        console=console,
    )
    print_plan(console, run)
    if options.json is not None:
        write_text(options.json, run.to_json())
