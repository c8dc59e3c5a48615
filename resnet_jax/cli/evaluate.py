"""``resnet-jax evaluate``."""

import argparse
from typing import Any

from resnet_jax.cli.arguments import whole
from resnet_jax.cli.overrides import parse_overrides
from resnet_jax.cli.processes import add_process_flags, connected
from resnet_jax.config.schema import MOST_BATCH, MOST_STEPS

_DESCRIPTION = """Evaluate a checkpoint of a run on a whole split.

Every example counts once, whatever the batch size. A run reports its last checkpoint;
its best one was chosen on a held-out part of the training set.

  resnet-jax evaluate --workdir runs/r56
  resnet-jax evaluate --workdir runs/r56 --config.data.path=/data/moved

Only fields of the data can be changed: where they are now, or other data of the same
classes. Labels are matched by class name.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "evaluate",
        help="evaluate a checkpoint of a run",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="the run's folder")
    splits = ("test", "holdout", "train")
    add("--split", default="test", choices=splits, help="(default: test)")
    add(
        "--checkpoint",
        default="last",
        type=_checkpoint,
        metavar="last|best|STEP",
        help="which checkpoint (default: last)",
    )
    add(
        "--batch-size",
        type=whole(1, MOST_BATCH),
        metavar="N",
        help="examples per batch (default: the config's); changes no result",
    )
    add(
        "--precise-batches",
        type=whole(1, MOST_STEPS),
        metavar="N",
        help="first recompute the batch statistics over N batches of the training set "
        "(default: use the checkpoint's)",
    )
    add_process_flags(parser)
    parser.set_defaults(run=_run, takes_overrides=True)


def _checkpoint(text: str) -> int | str:
    if text in ("last", "best"):
        return text
    if text.isascii() and text.isdecimal() and len(text) < 11:
        return int(text)
    raise argparse.ArgumentTypeError(f"last, best or a step, not {text!r}")


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.evaluation.evaluate import evaluate

    with connected(options):
        evaluate(
            options.workdir,
            split=options.split,
            checkpoint=options.checkpoint,
            batch_size=options.batch_size,
            precise_batches=options.precise_batches,
            overrides=parse_overrides(options.rest),
        )
