"""``resnet-jax report``."""

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "report",
        help="write the report of a finished run again, or draw its curves",
        description="Write report.html of a finished run again, and its training "
        "curves as a separate picture.",
    )
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="the run's folder")
    add("--figure", metavar="FILE.png|.svg|.pdf", help="where to draw the curves")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.training.report import report

    report(options.workdir, figure=options.figure)
