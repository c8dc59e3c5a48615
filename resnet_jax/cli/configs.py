"""``resnet-jax configs``."""

import argparse
from typing import Any

_DESCRIPTION = """List the config files that come with the package, or describe one.

  resnet-jax configs
  resnet-jax configs recipes/he2015

Each is a Python file. To change more than a few fields, copy it and give the copy's
path: --config mine.py.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "configs", help="config files by name", description=_DESCRIPTION
    )
    parser.add_argument("name", nargs="?", help="what it says of itself, and its path")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.config.files import config_file, list_configs
    from resnet_jax.console import make_console, print_facts, say

    if options.name is None:
        print_facts(make_console(), list_configs())
        return
    path, documentation = config_file(options.name)
    say(make_console(), f"{path}\n\n{documentation}")
