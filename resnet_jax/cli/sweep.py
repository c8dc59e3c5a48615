"""``resnet-jax sweep``."""

import argparse
from typing import Any

from resnet_jax.cli.overrides import CONFIG, fields_help, parse_overrides
from resnet_jax.cli.processes import add_process_flags, connected

_DESCRIPTION = """Train every combination of values of some fields.

  resnet-jax sweep --config digits --workdir runs/sweep \\
      --grid optimizer.learning_rate=0.05,0.1,0.2 \\
      --grid model.name=cifar_resnet20,cifar_plain20 \\
      --config.seeds=3 --config.data.holdout_examples=200

The same command continues where it stopped, and a larger grid keeps finished runs. At
the end one table and one plot show the error of each combination: mean and standard
deviation over its seeds.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "sweep",
        help="train a grid over config fields, with seeds",
        description=_DESCRIPTION,
        epilog=fields_help(),
    )
    add = parser.add_argument
    add("--config", required=True, metavar="NAME|FILE.py[:ARG]", help=CONFIG)
    add("--workdir", required=True, metavar="DIR", help="folder of all runs")
    add(
        "--grid",
        action="append",
        default=[],
        metavar="FIELD=VALUE,VALUE",
        help="values of a field; repeat it for several",
    )
    add_process_flags(parser)
    parser.set_defaults(run=_run, takes_overrides=True)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.console import loading

    with loading():
        from resnet_jax.config import load_config
        from resnet_jax.training.sweep import parse_grid, sweep

    overrides = parse_overrides(options.rest)
    grid = parse_grid(options.grid)
    timeout = load_config(options.config, overrides).parallel.peer_timeout_seconds
    with connected(options, timeout):
        sweep(options.config, grid, options.workdir, overrides=overrides)
