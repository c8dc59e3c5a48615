"""``resnet-jax predict``."""

import argparse
from typing import Any

from resnet_jax.cli.arguments import MOST_CLASSES, output_file, whole
from resnet_jax.cli.nets import add_net_flags, net_options
from resnet_jax.errors import UserError

_DESCRIPTION = """Print the likeliest classes of pictures.

  resnet-jax predict --weights torchvision:resnet50 cat.jpg dog.png
  resnet-jax predict --weights runs/digits pictures/ --top 1 --json predictions.jsonl
  resnet-jax predict --weights resnet50.safetensors pictures/ --html pictures.html

Folders are read at any depth; other files in them are ignored. Pictures are turned
upright as their EXIF says. Broken pictures are named on standard error and left out;
the exit status is then 1.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "predict",
        help="print the likeliest classes of pictures",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders")
    add_net_flags(parser)
    add(
        "--top",
        type=whole(1, MOST_CLASSES),
        default=5,
        metavar="N",
        help="classes per picture (default: 5)",
    )
    add(
        "--protocol",
        metavar="TEXT",
        help="views whose outputs are averaged: ten_crop, "
        "center:size=288,shorter_side=320, ... (default: the net's own single view)",
    )
    add(
        "--json",
        type=output_file,
        metavar="FILE",
        help="also write one JSON object per picture here: image, classes, names, "
        "probabilities",
    )
    add(
        "--html",
        type=output_file,
        metavar="FILE",
        help="also write a page here: the first 100 pictures, their classes, and the "
        "regions that support the first class",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.console import loading

    with loading():
        from resnet_jax.analysis.predictions import predict_files
        from resnet_jax.evaluation.classifier import Classifier

    classifier = Classifier.from_pretrained(
        options.weights, protocol=options.protocol, **net_options(options)
    )
    number, broken = predict_files(
        classifier,
        options.images,
        top=options.top,
        json_path=options.json,
        html_path=options.html,
    )
    if broken:
        raise UserError(
            f"{broken:,} of {number + broken:,} could not be read: see the lines above"
        )
