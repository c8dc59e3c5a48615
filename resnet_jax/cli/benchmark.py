"""``resnet-jax benchmark``."""

import argparse
from typing import Any

from resnet_jax.cli.overrides import parse_overrides
from resnet_jax.cli.processes import add_process_flags, connected


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser("benchmark", help="measure speed on this machine")
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    step = kinds.add_parser(
        "step",
        help="the training step on random images on the device",
        description="Times the jitted training step: forward, backward, optimizer, "
        "normalisation and, for a CIFAR net, crop and flip. Prints medians, and the "
        "compile time separately.",
    )
    step.add_argument(
        "--model",
        default="cifar_resnet20",
        metavar="NAME",
        help="a name of resnet_jax.list_models() (default: cifar_resnet20)",
    )
    step.add_argument(
        "--batch",
        type=int,
        default=128,
        metavar="N",
        help="images per step, over all devices (default: 128)",
    )
    step.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the images (default: the net's own)",
    )
    step.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the convolutions (default: float32)",
    )
    step.add_argument(
        "--steps", type=int, default=20, metavar="N", help="timed steps (default: 20)"
    )
    step.add_argument("--json", metavar="FILE", help="also write the result here")
    step.set_defaults(run=_run_step)
    reading = kinds.add_parser(
        "input",
        help="the input pipeline of a config, up to the device",
        description="Times the training batches of a config without any step: read, "
        "decoded, cropped and put on the devices. Any field can be overridden: "
        "--config.data.num_threads=4",
        allow_abbrev=False,
    )
    reading.add_argument(
        "--config", required=True, metavar="FILE.py[:ARG]", help="config file"
    )
    reading.add_argument(
        "--batches", type=int, default=50, metavar="N", help="per round (default: 50)"
    )
    reading.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="(default: 5)"
    )
    reading.add_argument("--json", metavar="FILE", help="also write the result here")
    add_process_flags(reading)
    reading.set_defaults(run=_run_input, takes_overrides=True)


def _run_step(options: argparse.Namespace) -> None:
    from resnet_jax.training.benchmark import benchmark_step

    benchmark_step(
        options.model,
        batch_size=options.batch,
        image_size=options.image_size,
        dtype=options.dtype,
        steps=options.steps,
        json_path=options.json,
    )


def _run_input(options: argparse.Namespace) -> None:
    from resnet_jax.config import load_config
    from resnet_jax.training.benchmark import benchmark_input

    config = load_config(options.config, parse_overrides(options.rest))
    with connected(options):
        benchmark_input(
            config,
            batches=options.batches,
            rounds=options.rounds,
            json_path=options.json,
        )
