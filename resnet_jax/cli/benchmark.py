"""``resnet-jax benchmark``."""

import argparse
from typing import Any

from resnet_jax.cli.arguments import MOST_COUNT, output_file, whole
from resnet_jax.cli.nets import NETS
from resnet_jax.cli.overrides import CONFIG, parse_overrides
from resnet_jax.cli.processes import add_process_flags, connected
from resnet_jax.config.schema import MOST_BATCH, MOST_PIXELS
from resnet_jax.errors import UserError


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser("benchmark", help="measure speed on this machine")
    kinds = parser.add_subparsers(metavar="KIND")
    step = kinds.add_parser(
        "step",
        help="the training step on random images on the device",
        description="Times the jitted training step: forward, backward, optimizer, "
        "normalisation and, for a CIFAR net, crop and flip. Prints medians, and the "
        "compile time separately.",
    )
    add = step.add_argument
    net, dtypes = "cifar_resnet20", ("float32", "bfloat16")
    images, side, steps = map(whole, (1, 1, 1), (MOST_BATCH, MOST_PIXELS, MOST_COUNT))
    add("--model", default=net, metavar="NAME", help=f"net (default: {net})")
    add("--batch", type=images, default=128, help="images per step (default: 128)")
    add("--image-size", type=side, metavar="PIXELS", help="side (default: the net's)")
    add("--dtype", default="float32", choices=dtypes, help="default: float32")
    add("--steps", type=steps, default=20, help="timed steps (default: 20)")
    add("--json", type=output_file, metavar="FILE", help="also write the result here")
    step.set_defaults(run=_run_step)

    inference = kinds.add_parser(
        "inference",
        help="the forward pass of a net, by batch size",
        description="Times the forward pass on random uint8 images that are on the "
        "device. Pixels are normalised; batch normalisation is folded into the "
        "convolutions. Prints images per second of the median call, percentiles of "
        "the latency, and compile times.",
    )
    add = inference.add_argument
    add("--weights", metavar="NET", help=f"{NETS} (default: random weights)")
    add(
        "--model",
        metavar="NAME",
        help="the net's name in resnet_jax.list_models(), if NET lacks it",
    )
    batches: Any = {"type": images, "nargs": "+", "default": (1, 8, 32)}
    add("--batch", metavar="N", help="images per call (default: 1 8 32)", **batches)
    add("--dtype", choices=dtypes, help="of the convolutions (default: the net's own)")
    add("--steps", type=steps, default=50, metavar="N", help="calls (default: 50)")
    add("--json", type=output_file, metavar="FILE", help="also write the result here")
    inference.set_defaults(run=_run_inference)

    reading = kinds.add_parser(
        "input",
        help="the input pipeline of a config, up to the device",
        description="Times the training batches of a config without any step: read, "
        "decoded, cropped and put on the devices. Any field can be overridden: "
        "--config.data.num_threads=4",
    )
    add = reading.add_argument
    add("--config", required=True, metavar="NAME|FILE.py[:ARG]", help=CONFIG)
    add("--batches", type=steps, default=50, help="batches per round (default: 50)")
    add("--rounds", type=steps, default=5, metavar="N", help="repetitions (default: 5)")
    add("--json", type=output_file, metavar="FILE", help="also write the result here")
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


def _run_inference(options: argparse.Namespace) -> None:
    from resnet_jax.evaluation.nets import load_net
    from resnet_jax.training.benchmark import benchmark_inference

    if options.weights is None and options.model is None:
        raise UserError("give --model NAME, or --weights NET for a trained net")
    given = options.weights
    benchmark_inference(
        options.model if given is None else load_net(given, model=options.model),
        batch_sizes=options.batch,
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
