"""``resnet-jax features``."""

import argparse
from typing import Any

from resnet_jax.cli.arguments import output_file, whole
from resnet_jax.cli.nets import add_net_flags, net_options
from resnet_jax.cli.overrides import parse_overrides
from resnet_jax.config.schema import MOST_BATCH

_DESCRIPTION = """Write the features of images: the inputs of a net's classifier.

  resnet-jax features --weights torchvision:resnet50 /data/mine/train \\
      --out train.safetensors
  resnet-jax features --weights runs/r56 --split test --out test.npz

The file holds features (n, c), labels (n,) and the names of the files. docs/finetune.md
shows how to train a classifier on two such files. --config.data.on_error=skip leaves
broken images out and names them; by default the first one stops the command.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "features",
        help="write the features that a net computes for images",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    add(
        "data",
        nargs="?",
        metavar="DATA",
        help="a folder of images, of class folders or of a data set, or a tfds name "
        "(default: the data of the run)",
    )
    add(
        "--out",
        required=True,
        type=output_file,
        metavar="FILE",
        help="the .safetensors or .npz file to write",
    )
    add_net_flags(parser)
    add(
        "--split",
        help="of a data set, or a part: 'train[:10%%]' (default: test or val)",
    )
    add(
        "--batch-size",
        default=64,
        type=whole(1, MOST_BATCH),
        metavar="N",
        help="images per batch (default: 64); does not affect results",
    )
    add("--force", action="store_true", help="replace the file if it exists")
    parser.set_defaults(run=_run, takes_overrides=True)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.evaluation.features import extract_features
    from resnet_jax.evaluation.nets import load_net

    overrides = parse_overrides(options.rest)
    moved = overrides if options.data is None else None
    extract_features(
        load_net(options.weights, overrides=moved, **net_options(options)),
        options.data,
        split=options.split,
        overrides=overrides,
        batch_size=options.batch_size,
        out=options.out,
        force=options.force,
    )
