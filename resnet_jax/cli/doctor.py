"""``resnet-jax doctor``."""

import argparse
from typing import Any

from resnet_jax.cli.arguments import output_file

_DESCRIPTION = """Check this machine: versions, devices, caches, and what to do.

  resnet-jax doctor
  resnet-jax doctor --json machine.json

Each device compiles and runs a small convolution, in another process, so that a broken
one cannot hang the command. Hints come last. The exit status is 1 if no device works.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "doctor",
        help="check versions, devices and caches of this machine",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="also write the facts here"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.doctor import doctor

    doctor(json_path=options.json)
