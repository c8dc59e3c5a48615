"""``resnet-jax convert``."""

import argparse
from typing import Any

_DESCRIPTION = """Write weights in another layout, torch's or Flax's.

  resnet-jax convert torchvision:resnet50 resnet50.safetensors
  resnet-jax convert runs/digits digits.safetensors
  resnet-jax convert digits.safetensors digits_torch.safetensors

The flax layout names the arrays as the net does; the torch layout is what
torchvision's and timm's nets load. The number of classes and of the images' channels
are those of the file.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "convert",
        help="convert weights from and to the layout of torchvision and timm",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="IN",
        help="a file of safetensors or torch.save, hf-hub:OWNER/NAME, "
        "torchvision:MODEL, or a run's workdir (its last checkpoint)",
    )
    parser.add_argument("target", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a name of resnet_jax.list_models(); needed where IN does not say it",
    )
    parser.add_argument(
        "--layout",
        choices=("flax", "torch"),
        help="of OUT (default: the other one than IN's; flax for a workdir)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.weights import convert_weights

    convert_weights(
        options.source,
        options.target,
        model=options.model,
        layout=options.layout,
        force=options.force,
    )
