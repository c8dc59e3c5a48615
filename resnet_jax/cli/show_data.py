"""``resnet-jax show-data``."""

import argparse
from typing import Any

from resnet_jax.cli.arguments import output_file, whole
from resnet_jax.cli.overrides import CONFIG, parse_overrides
from resnet_jax.config.schema import MOST_BATCH

_DESCRIPTION = """Show a batch as the net sees it, without training.

  resnet-jax show-data --config digits --out batch.png
  resnet-jax show-data --config cifar10 --out batch.html --images 64 \\
      --config.augmentation.mixup_alpha=0.2

The pictures are cropped, flipped, augmented and mixed as in the run's first step; only
the normalisation is undone. Class names are below them. --config.FIELD=VALUE overrides
any field.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "show-data",
        help="show a batch of a config's data as the net sees it",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="NAME|FILE.py[:ARG]", help=CONFIG)
    add(
        "--out",
        required=True,
        type=output_file,
        metavar="FILE",
        help="where to draw: .png, .svg, .pdf or .html",
    )
    add(
        "--split",
        default="train",
        metavar="NAME",
        help="train, test or holdout; the last two as in evaluation (default: train)",
    )
    add(
        "--images",
        type=whole(1, MOST_BATCH),
        default=32,
        metavar="N",
        help="images to show, at most a batch (default: %(default)s)",
    )
    parser.set_defaults(run=_run, takes_overrides=True)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.config import load_config
    from resnet_jax.training.show_data import show_data

    config = load_config(options.config, parse_overrides(options.rest))
    show_data(config, split=options.split, images=options.images, out=options.out)
