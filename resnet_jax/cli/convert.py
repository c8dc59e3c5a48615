"""``resnet-jax convert``: weights of a file or a run, to a file in either layout."""

import argparse
from typing import Any

_DESCRIPTION = """Write weights in another layout, torch's or Flax's.

  resnet-jax convert torchvision:resnet50 resnet50.safetensors
  resnet-jax convert runs/digits digits.safetensors
  resnet-jax convert digits.safetensors digits_torch.safetensors

The flax layout names arrays as the model does; torchvision and timm load the torch
layout. IN sets the number of classes and image channels.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "convert",
        help="convert weights from and to the layout of torchvision and timm",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "source",
        metavar="IN",
        help="a safetensors or torch.save file, hf-hub:OWNER/NAME, "
        "torchvision:MODEL, or a run's workdir (for its last checkpoint)",
    )
    parser.add_argument("target", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a name of resnet_jax.list_models(); needed if IN does not contain it",
    )
    parser.add_argument(
        "--layout",
        choices=("flax", "torch"),
        help="layout of OUT (default: the opposite of IN; flax for a workdir)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.evaluation.convert import convert_weights

    convert_weights(
        options.source,
        options.target,
        model=options.model,
        layout=options.layout,
        force=options.force,
    )
