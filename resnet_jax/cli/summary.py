"""``resnet-jax summary``."""

import argparse
from typing import Any

from resnet_jax.cli.arguments import MOST_CLASSES, output_file, whole
from resnet_jax.config.schema import MOST_PIXELS

_DESCRIPTION = """Print nets stage by stage; without a name, list all nets.

  resnet-jax summary
  resnet-jax summary resnet50 --blocks
  resnet-jax summary resnet34 --compare plain34

Each stage has a row: output shape, stride and receptive field in pixels of the image,
parameters and multiply-adds. Nothing is computed on data.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "summary",
        help="print shapes, sizes, costs and receptive fields of nets by stage",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="names of resnet_jax.list_models(); a table for each",
    )
    parser.add_argument(
        "--compare", nargs="*", metavar="NAME", help="print two nets side by side"
    )
    parser.add_argument(
        "--image-size",
        type=whole(1, MOST_PIXELS),
        metavar="PIXELS",
        help="side of the images (default: the net's own)",
    )
    parser.add_argument(
        "--num-classes",
        type=whole(1, MOST_CLASSES),
        metavar="N",
        help="classes of the classifier (default: the net's own)",
    )
    parser.add_argument(
        "--blocks", action="store_true", help="also print a row for every block"
    )
    parser.add_argument(
        "--shortcut",
        metavar="OPTION",
        help="a value of the config's model.shortcut, such as A, B, C, pooled or none; "
        "plain nets stay plain",
    )
    parser.add_argument(
        "--stride-version",
        metavar="VERSION",
        help="where a bottleneck block strides: v1 (the paper) or v1.5",
    )
    parser.add_argument(
        "--output-stride",
        type=whole(1, 32),
        metavar="PIXELS",
        help="stride of the last map of an ImageNet net: 8, 16 or 32",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="also write the figures here"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.analysis.summary import print_catalog, print_summaries

    if not options.names and options.compare is None:
        print_catalog()
        return
    print_summaries(
        [*options.names, *(options.compare or ())],
        compare=options.compare is not None,
        image_size=options.image_size,
        num_classes=options.num_classes,
        depth=2 if options.blocks else 1,
        shortcut=options.shortcut,
        stride_version=options.stride_version,
        output_stride=options.output_stride,
        json_path=options.json,
    )
