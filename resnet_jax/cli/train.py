"""``resnet-jax train``."""

import argparse
from typing import Any

from resnet_jax.cli.overrides import CONFIG, chosen_config, fields_help
from resnet_jax.cli.processes import add_process_flags, connected

_DESCRIPTION = """Train a net as a config file says, in a workdir.

On an unfinished workdir the same command continues where the run stopped, bit for bit.
On a finished one it prints the result. Any field can be overridden:

  resnet-jax train --config cifar10:cifar_resnet56 --workdir runs/r56 \\
      --config.optimizer.learning_rate=0.05 --config.training.steps=200
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "train",
        help="train a net from a config file, or continue",
        description=_DESCRIPTION,
        epilog=fields_help(),
    )
    add = parser.add_argument
    add(
        "--config",
        metavar="NAME|FILE.py[:ARG]",
        help=f"{CONFIG}; not needed to continue a workdir",
    )
    add("--workdir", required=True, metavar="DIR", help="the run's folder")
    add_process_flags(parser)
    parser.set_defaults(run=_run, takes_overrides=True)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.console import loading

    with loading():
        # First: the answer to a mistake should not wait.
        config = chosen_config(options)
        from resnet_jax.training.train import train

    with connected(options, config.parallel.peer_timeout_seconds):
        train(config, options.workdir)
