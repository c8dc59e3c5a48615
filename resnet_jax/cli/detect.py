"""``resnet-jax detect``."""

import argparse
from typing import Any

from resnet_jax.cli.arguments import MOST_COUNT, output_file, positive, whole
from resnet_jax.cli.overrides import CONFIG, chosen_config, fields_help, parse_overrides
from resnet_jax.cli.processes import add_process_flags, connected
from resnet_jax.config.detection import DetectionConfig
from resnet_jax.errors import UserError

_TRAIN = """Train a detector as a config file says, in a workdir.

  resnet-jax detect train --config detection/bccd --workdir runs/bccd \\
      --config.data.path=BCCD
  resnet-jax detect train --config detection/voc07 --workdir runs/voc07 \\
      --config.data.path=VOCdevkit/VOC2007 \\
      --config.model.weights=torchvision:resnet101

On an unfinished workdir the same command continues where the run stopped, bit for bit.
On a finished one it prints the result. Any field can be overridden.
"""

_EVALUATE = """Test a detector on a whole split, by VOC's and COCO's measures.

  resnet-jax detect evaluate --workdir runs/bccd --html bccd.html
  resnet-jax detect evaluate --workdir runs/coco --config.evaluation.metric=coco
  resnet-jax detect evaluate --workdir runs/voc07 --config.data.path=VOC2012 \\
      --config.data.test_split=val
  resnet-jax detect evaluate --workdir runs/a runs/b \\
      --config.detector.test_refine=true \\
      --config.detector.test_scales=200,400,600,800,1000

Several workdirs are an ensemble. Precision is the mean over the classes at IoU 0.5, by
area and by 11 points. --config.FIELD=VALUE says where data are now, which split to use,
and other sizes or thresholds; detector.test_* are the improvements of appendix B.
"""

_PREDICT = """Print what a detector finds in pictures, and draw it.

  resnet-jax detect predict --workdir runs/bccd pictures/ --out found
  resnet-jax detect predict --workdir runs/bccd cell.jpg --json found.jsonl

Folders are read at any depth. Broken pictures are named on standard error and left out;
the exit status is then 1. --config.FIELD=VALUE changes sizes, thresholds, and
detector.test_*, the improvements of the paper's appendix B.
"""


_PREPARE = """Write annotated images as shards, which open and read fast.

  resnet-jax detect prepare coco prepared --splits train2017,val2017
  resnet-jax detect prepare tfds:voc/2007 prepared --splits train,validation,test

Train on them with --config.data.path=prepared; --config.data.train_split may join
splits, such as train+validation. An interrupted run continues.
resnet-jax prepare --verify prepared compares them with their checksums.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "detect", help="object detection: train, evaluate, predict, prepare"
    )
    actions = parser.add_subparsers(metavar="ACTION")
    _add_train(actions)
    _add_evaluate(actions)
    _add_predict(actions)
    _add_prepare(actions)


def _add_train(actions: Any) -> None:
    parser = actions.add_parser(
        "train",
        help="train a detector from a config file, or continue",
        description=_TRAIN,
        epilog=fields_help(DetectionConfig),
    )
    add = parser.add_argument
    add(
        "--config",
        metavar="NAME|FILE.py[:ARG]",
        help=f"{CONFIG}; not needed to continue a workdir",
    )
    add("--workdir", required=True, metavar="DIR", help="the run's folder")
    add_process_flags(parser)
    parser.set_defaults(run=_train, takes_overrides=True, schema=DetectionConfig)


def _add_evaluate(actions: Any) -> None:
    parser = actions.add_parser(
        "evaluate", help="test a detector on a split", description=_EVALUATE
    )
    add = parser.add_argument
    _add_workdirs(parser, "several are an ensemble", nargs="+", action="extend")
    add("--checkpoint", metavar="STEP", default="last", help="last (default) or a step")
    add("--json", type=output_file, metavar="FILE", help="write the result here")
    add("--html", type=output_file, metavar="FILE", help="write a page about it here")
    add_process_flags(parser)
    parser.set_defaults(run=_evaluate, takes_overrides=True, schema=DetectionConfig)


def _add_predict(actions: Any) -> None:
    parser = actions.add_parser(
        "predict", help="find objects in pictures", description=_PREDICT
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders")
    _add_workdirs(parser, "given several times, an ensemble", action="append")
    add(
        "--score",
        type=positive(1),
        default=0.5,
        metavar="X",
        help="smallest score of what is shown (default: 0.5)",
    )
    add("--out", metavar="FOLDER", help="write the pictures with their boxes here")
    add(
        "--json",
        type=output_file,
        metavar="FILE",
        help="write one JSON object per picture here: image and detections",
    )
    parser.set_defaults(run=_predict, takes_overrides=True, schema=DetectionConfig)


def _add_workdirs(
    parser: argparse.ArgumentParser, ensemble: str, **several: Any
) -> None:
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR|FILE",
        help="a run of detect train, or the file of a torchvision or Detectron2 "
        f"detector with one map (C4); {ensemble}",
        **several,
    )


def _add_prepare(actions: Any) -> None:
    parser = actions.add_parser(
        "prepare", help="write annotated images as shards", description=_PREPARE
    )
    add = parser.add_argument
    add("source", help="a folder in VOC or COCO layout, or tfds:NAME[:VERSION]")
    add("output", help="a new folder, or one of an interrupted run")
    add(
        "--splits",
        default="trainval,test",
        metavar="NAME,NAME",
        help="the first one defines the classes (default: trainval,test)",
    )
    add("--format", choices=("voc", "coco"), help="default: by what the folder holds")
    add("--data-dir", metavar="DIR", help="where tfds data sets are prepared")
    add("--shards", type=whole(1, MOST_COUNT), metavar="N", help="of each split")
    add(
        "--on-error",
        default="stop",
        choices=("stop", "skip"),
        help="at a broken image, stop, or leave it out and list it (default: stop)",
    )
    parser.set_defaults(run=_prepare)


def _train(options: argparse.Namespace) -> None:
    from resnet_jax.console import loading

    with loading():
        # First: the answer to a mistake should not wait.
        config = chosen_config(options, DetectionConfig)
        from resnet_jax.detection.train import train_detector

    with connected(options, config.parallel.peer_timeout_seconds):
        train_detector(config, options.workdir)


def _evaluate(options: argparse.Namespace) -> None:
    from resnet_jax.console import loading

    with loading():
        from resnet_jax.detection.evaluate import evaluate_detector

    checkpoint = options.checkpoint
    with connected(options):
        evaluate_detector(
            options.workdir,
            checkpoint=int(checkpoint) if checkpoint.isdecimal() else checkpoint,
            overrides=parse_overrides(options.rest),
            json_path=options.json,
            html_path=options.html,
        )


def _predict(options: argparse.Namespace) -> None:
    from resnet_jax.console import loading

    with loading():
        from resnet_jax.detection.predict import predict_boxes

    number, broken = predict_boxes(
        options.workdir,
        options.images,
        overrides=parse_overrides(options.rest),
        score=options.score,
        out=options.out,
        json_path=options.json,
    )
    if broken:
        raise UserError(
            f"{broken:,} of {number + broken:,} could not be read: see the lines above"
        )


def _prepare(options: argparse.Namespace) -> None:
    from resnet_jax.console import loading

    with loading():
        from resnet_jax.detection.prepare import prepare_detection

    prepare_detection(
        options.source,
        options.output,
        splits=[name.strip() for name in options.splits.split(",")],
        format=options.format,
        data_dir=options.data_dir,
        num_shards=options.shards,
        on_error=options.on_error,
    )
