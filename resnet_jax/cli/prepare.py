"""``resnet-jax prepare``."""

import argparse
from typing import Any

from resnet_jax.errors import UserError

_DESCRIPTION = """Write a data set as shards of ArrayRecord, which training reads fast.

  resnet-jax prepare /data/imagenet prepared --splits train,val
  resnet-jax prepare ILSVRC2012_img_train.tar prepared --shorter-side 480 --quality 90
  resnet-jax prepare tfds:imagenet2012 prepared --data-dir ~/tensorflow_datasets
  resnet-jax prepare --verify prepared

SOURCE is a folder of SPLIT/CLASS/IMAGE (ImageNet as extracted, too), a tar of tars as
ImageNet is distributed or the folder that holds its tars, or a data set of tfds, also
one that is prepared as TFRecord. Stopped at any moment, the same command goes on.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "prepare",
        help="convert a folder, ImageNet's tars or a tfds data set to fast shards",
        description=_DESCRIPTION,
        usage="resnet-jax prepare SOURCE OUTPUT [options]\n"
        "       resnet-jax prepare --verify OUTPUT",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="SOURCE OUTPUT",
        help="SOURCE is a folder, a tar or tfds:NAME[:VERSION]; OUTPUT is a new folder",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the shards of a finished OUTPUT with their checksums",
    )
    parser.add_argument(
        "--splits",
        metavar="NAME,NAME",
        help="which splits to take (default: all)",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where tfds data sets are prepared (default: ~/tensorflow_datasets)",
    )
    parser.add_argument(
        "--shorter-side",
        type=int,
        metavar="PIXELS",
        help="make images with a longer shorter side so small (default: keep all)",
    )
    parser.add_argument(
        "--quality",
        type=int,
        metavar="Q",
        help="encode all images as JPEG of this quality, where that is smaller "
        "(default: those made smaller alone, with 95)",
    )
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="number of shards of each split (default: by --shard-mib)",
    )
    parser.add_argument(
        "--shard-mib",
        type=int,
        default=512,
        metavar="MIB",
        help="size of a shard, about (default: 512)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="shards that are written at once (default: one for each processor)",
    )
    parser.add_argument(
        "--on-error",
        default="stop",
        choices=("stop", "skip"),
        help="at a broken image: stop, or leave it out and list it (default: stop)",
    )
    parser.set_defaults(run=_run, takes_overrides=True)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.prepare import prepare_dataset, verify

    # argparse does not find OUTPUT where options stand between it and SOURCE.
    paths = [*options.paths, *options.rest]
    unknown = [path for path in paths if path.startswith("-")]
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; see resnet-jax prepare --help")
    if len(paths) != (1 if options.verify else 2):
        raise UserError(
            "prepare takes SOURCE and OUTPUT, or --verify and OUTPUT alone; given "
            f"{', '.join(paths) or 'nothing'}"
        )
    if options.verify:
        verify(paths[0], threads=options.threads)
        return
    splits = options.splits and [name.strip() for name in options.splits.split(",")]
    prepare_dataset(
        paths[0],
        paths[1],
        splits=splits,
        data_dir=options.data_dir,
        shorter_side=options.shorter_side,
        quality=options.quality,
        num_shards=options.shards,
        shard_mib=options.shard_mib,
        threads=options.threads,
        on_error=options.on_error,
    )
