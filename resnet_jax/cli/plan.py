"""``resnet-jax plan``."""

import argparse
from typing import Any

from resnet_jax.cli.overrides import parse_overrides

_DESCRIPTION = """Check a training run on paper: steps, memory, time and input rate.

  resnet-jax plan --config configs/imagenet.py:resnet50,goyal2017 \\
      --devices 256 --hosts 32 --chip tpu_v5e --config.model.dtype=bfloat16

Needs no accelerator and no data. The real training step is traced for one device, and
published figures of chips make bounds of it: roofline, not measured. Any field may be
overridden: --config.FIELD=VALUE.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "plan",
        help="steps, memory, time and input rate of a run, on paper",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def number(name: str, kind: Any, metavar: str, meaning: str) -> None:
        parser.add_argument(name, type=kind, metavar=metavar, help=meaning)

    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:ARG]", help="config file"
    )
    number("--devices", int, "N", "chips that share a batch (default: 1)")
    number("--hosts", int, "N", "hosts that hold them (default: 1)")
    parser.add_argument(
        "--chip",
        nargs="+",
        default=[],
        metavar="NAME",
        dest="chips",
        help="such as tpu_v5e or h200_sxm (default: all that are known)",
    )
    number("--efficiency", float, "SHARE", "of the peaks that is reached (default: 1)")
    number(
        "--images-per-core",
        float,
        "N",
        "that a core reads a second, as `resnet-jax benchmark input` measures "
        "(default: 633, see docs/plan.md)",
    )
    number("--image-bytes", float, "BYTES", "mean size of a stored image")
    number(
        "--interconnect",
        float,
        "GB/s",
        "of a device, both directions together, in place of the chip's own",
    )
    number("--examples", int, "N", "training examples of a data set not known")
    number("--classes", int, "K", "its classes")
    number("--image-size", int, "PIXELS", "side of its images")
    parser.add_argument("--json", metavar="FILE", help="also write the plan here")
    parser.set_defaults(run=_run, takes_overrides=True)


def _run(options: argparse.Namespace) -> None:
    import rich.console

    from resnet_jax.config import load_config
    from resnet_jax.planning import plan, print_plan
    from resnet_jax.training.benchmark import write_text

    given = {
        "devices": options.devices,
        "hosts": options.hosts,
        "chips": options.chips,
        "efficiency": options.efficiency,
        "images_per_core": options.images_per_core,
        "mean_image_bytes": options.image_bytes,
        "interconnect": options.interconnect,
        "examples": options.examples,
        "classes": options.classes,
        "image_size": options.image_size,
    }
    on_paper = plan(
        load_config(options.config, parse_overrides(options.rest)),
        **{name: value for name, value in given.items() if value is not None},
    )
    print_plan(rich.console.Console(), on_paper)
    if options.json is not None:
        write_text(options.json, on_paper.to_json())
