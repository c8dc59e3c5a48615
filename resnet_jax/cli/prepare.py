"""``resnet-jax prepare``."""

import argparse
from typing import Any

from resnet_jax.cli.arguments import MOST_COUNT, MOST_THREADS, whole
from resnet_jax.config.schema import MAX_IMAGE_PIXELS, MOST_PIXELS
from resnet_jax.errors import UserError

_DESCRIPTION = """Write a data set as shards of ArrayRecord, which training reads fast.

  resnet-jax prepare /data/imagenet prepared --splits train,val
  resnet-jax prepare ILSVRC2012_img_train.tar prepared --shorter-side 480 --quality 90
  resnet-jax prepare tfds:imagenet2012 prepared --data-dir ~/tensorflow_datasets
  resnet-jax prepare --verify prepared

SOURCE is a folder of SPLIT/CLASS/IMAGE (such as ImageNet, extracted), one of ImageNet's
tars or the folder with them, or a tfds data set, as ArrayRecord or TFRecord. The same
command continues an interrupted run.
"""

_OPTIONS = (
    ("--splits", str, "NAME,NAME", "splits to convert (default: all)"),
    (
        *("--data-dir", str, "DIR"),
        "where tfds data sets are prepared (default: ~/tensorflow_datasets)",
    ),
    (
        *("--shorter-side", whole(1, MOST_PIXELS), "PIXELS"),
        "reduce images with a longer shorter side to it (default: keep all sizes)",
    ),
    (
        *("--quality", whole(1, 100), "Q"),
        "JPEG quality, 1 to 100, of all images that it makes smaller (default: encode "
        "only reduced images, with 95)",
    ),
    (
        *("--shards", whole(1, MOST_COUNT), "N"),
        "number of shards of each split (default: by --shard-mib)",
    ),
    (
        *("--shard-mib", whole(1, MOST_COUNT), "MIB"),
        "approximate size of a shard (default: 512)",
    ),
    (
        *("--max-image-pixels", whole(1, 2**40), "N"),
        "an image whose header states more is broken (default: 89,478,485)",
    ),
    (
        *("--threads", whole(1, MOST_THREADS), "N"),
        "shards written at once (default: one per processor)",
    ),
)


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "prepare",
        help="convert a folder, ImageNet's tars or a tfds data set to fast shards",
        description=_DESCRIPTION,
        usage="resnet-jax prepare SOURCE OUTPUT [options]\n"
        "       resnet-jax prepare --verify OUTPUT",
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
    for option, kind, metavar, text in _OPTIONS:
        parser.add_argument(option, type=kind, metavar=metavar, help=text)
    parser.add_argument(
        "--on-error",
        default="stop",
        choices=("stop", "skip"),
        help="at a broken image, stop, or leave it out and list it (default: stop)",
    )
    parser.set_defaults(shard_mib=512, max_image_pixels=MAX_IMAGE_PIXELS)
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
        max_image_pixels=options.max_image_pixels,
        on_error=options.on_error,
    )
