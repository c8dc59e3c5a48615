"""``resnet-jax export``."""

import argparse
from typing import Any

from resnet_jax.cli.nets import add_net_flags, net_options

_DESCRIPTION = """Write a trained net as one file that runs with jax alone.

  resnet-jax export --weights runs/digits digits.jax
  resnet-jax export --weights torchvision:resnet50 resnet50.jax --dtype bfloat16

  net = jax.export.deserialize(bytearray(open("digits.jax", "rb").read()))
  logits = net.call(images)  # uint8 (n, h, w, c), for any n

Weights and normalisation are inside; batch normalisation is folded into the
convolutions. The file runs on CPU, CUDA and TPU. digits.json beside it holds the class
names and the view of an image that the net expects. To write the weights alone, use
resnet-jax convert.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "export",
        help="write a trained net as a program that runs without this library",
        description=_DESCRIPTION,
    )
    add_net_flags(parser)
    parser.add_argument("target", metavar="OUT", help="the .jax file to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of convolutions and maps (default: the net's own)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.console import make_console, say
    from resnet_jax.evaluation.nets import load_net
    from resnet_jax.export import export_net

    net = load_net(options.weights, **net_options(options))
    facts = export_net(net, options.target, dtype=options.dtype, force=options.force)
    size = "x".join(map(str, facts["input"]["shape"][1:]))
    output = f"{facts['output']['shape'][1]} {facts['output_is']}"
    say(
        make_console(),
        f"wrote {options.target}: {net.name}, uint8 images of {size} to "
        f"{output}, for {', '.join(facts['platforms'])}",
    )
