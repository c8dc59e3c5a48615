"""``resnet-jax paper``."""

import argparse
from typing import Any

from resnet_jax.cli.arguments import whole
from resnet_jax.cli.overrides import fields_help, parse_overrides
from resnet_jax.cli.processes import add_process_flags, connected
from resnet_jax.config.schema import MOST_SEEDS

_RUN = """Run an experiment: train what is missing, then analyse it.

  resnet-jax paper run table6 --only cifar_resnet20,cifar_plain20 --seeds 3 \\
      --workdir runs/paper --config.data.path=/data/cifar-10-batches-bin
  resnet-jax paper run figure6 --workdir runs/paper --dataset digits --scale small
  resnet-jax paper run table2 --workdir runs/paper --dataset tiny-imagenet \\
      --scale small --config.data.path=/data/tiny-imagenet-200

The same command continues where it stopped and skips finished runs. Experiments in one
folder share their runs. --config.FIELD=VALUE overrides any config field.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "paper", help="the paper's tables and figures: list, run, report"
    )
    actions = parser.add_subparsers(metavar="ACTION")
    listing = actions.add_parser("list", help="all experiments and their runs")
    listing.set_defaults(run=_list)

    run = actions.add_parser(
        "run",
        help="run an experiment, or continue it",
        description=_RUN,
        epilog=fields_help(),
    )
    add = run.add_argument
    add("experiment", help="a name of `resnet-jax paper list`")
    add("--workdir", required=True, metavar="DIR", help="folder of all runs")
    add("--only", metavar="RUN,RUN", help="only these runs")
    add(
        "--seeds",
        type=whole(1, MOST_SEEDS),
        metavar="N",
        help="per run (default: as published)",
    )
    add("--scale", default="paper", help="paper, small (1/100) or tiny (1/1000)")
    add(
        "--dataset",
        metavar="NAME|FOLDER",
        help="other data: a folder; for small images cifar10, cifar100, digits, mnist "
        "or fashion_mnist; for ImageNet tiny-imagenet",
    )
    add_process_flags(run)
    run.set_defaults(run=_run, takes_overrides=True)

    report = actions.add_parser(
        "report", help="published and measured numbers, as a page and as Markdown"
    )
    add = report.add_argument
    add("--workdir", required=True, metavar="DIR", help="folder of all runs")
    add("--only", metavar="EXPERIMENT,EXPERIMENT", help="only these experiments")
    add("--figures", metavar="DIR", help="also draw PNG files there")
    report.set_defaults(run=_report)


def _names(text: str | None) -> list[str]:
    return [name for name in (text or "").split(",") if name]


def _list(_: argparse.Namespace) -> None:
    from resnet_jax.paper.experiments import print_experiments

    print_experiments()


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.console import loading

    with loading():
        from resnet_jax.paper.run import run_experiment
        from resnet_jax.paper.settings import Setting, peer_timeout

    setting = Setting(options.dataset, options.scale, parse_overrides(options.rest))
    with connected(options, peer_timeout(options.experiment, setting)):
        run_experiment(
            options.experiment,
            options.workdir,
            only=_names(options.only),
            seeds=options.seeds,
            setting=setting,
        )


def _report(options: argparse.Namespace) -> None:
    from resnet_jax.paper.report import report

    report(options.workdir, only=_names(options.only), figures=options.figures)
