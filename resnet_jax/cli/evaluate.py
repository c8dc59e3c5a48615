"""``resnet-jax evaluate``."""

import argparse
from typing import Any

from resnet_jax.cli.arguments import output_file, whole
from resnet_jax.cli.nets import add_net_flags, net_options
from resnet_jax.cli.overrides import parse_overrides
from resnet_jax.cli.processes import add_process_flags, connected
from resnet_jax.config.schema import MOST_BATCH, MOST_STEPS

_DESCRIPTION = """Evaluate trained nets on a whole split.

  resnet-jax evaluate --workdir runs/r56
  resnet-jax evaluate --weights torchvision:resnet50 --data /data/imagenet --split val
  resnet-jax evaluate --workdir runs/r50 --protocol ten_crop
  resnet-jax evaluate --workdir runs/r50 runs/r101 runs/r152 --ensemble probabilities
  resnet-jax evaluate --ensemble-config ensemble:runs/paper/imagenet

Every example counts once, whatever the batch size. Classes are matched by name. Runs
that differ in their seed alone get a mean and a deviation; two other nets get the
interval of their difference. A run is tested at its last checkpoint; --checkpoint best
takes the one with the lowest held-out error.

Protocols are KIND or KIND:FIELD=VALUE,FIELD=VALUE:
  center       size, shorter_side, interpolation, flip
  ten_crop     size, shorter_side, interpolation, average
  multi_scale  shorter_sides=224+256, flip, pooling=global|windows, average
  stored       flip

--config.data.FIELD=VALUE says where a run's data are now, or how to read them.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "evaluate",
        help="test runs and weights, one or several, by any protocol",
        description=_DESCRIPTION,
    )
    add_net_flags(parser, several=True)
    add = parser.add_argument
    add(
        "--ensemble-config",
        metavar="FILE[:ARG]",
        help="a config file that lists nets with their protocols",
    )
    add("--data", metavar="FOLDER|NAME", help="other data (default: the run's)")
    add(
        "--split",
        help="of a run: test, holdout or train; or a split of --data (default: test)",
    )
    add(
        "--protocol",
        metavar="TEXT",
        help="views of each image, see above (default: the net's own)",
    )
    add(
        "--ensemble",
        choices=("probabilities", "logits"),
        help="also test the mean of all nets",
    )
    add(
        "--labels",
        metavar="FILE",
        help="file with several labels per ImageNet image (ReaL)",
    )
    add(
        "--class-map",
        metavar="FILE",
        help="file with the net's class for each class of the data, if names differ",
    )
    add(
        "--all-classes",
        action="store_true",
        help="if the data have only some classes, let the net choose among all",
    )
    add(
        "--batch-size",
        type=whole(1, MOST_BATCH),
        metavar="N",
        help="views per batch (default: the config's); does not affect results",
    )
    add(
        "--precise-batches",
        type=whole(1, MOST_STEPS),
        metavar="N",
        help="first recompute a run's batch statistics over N of its batches (default: "
        "use the checkpoint's)",
    )
    add("--json", type=output_file, metavar="FILE", help="write the result here")
    add("--html", type=output_file, metavar="FILE", help="write a page about it here")
    add_process_flags(parser)
    parser.set_defaults(run=_run, takes_overrides=True)


def _run(options: argparse.Namespace) -> None:
    from resnet_jax.console import loading

    with loading():
        from resnet_jax.analysis.evaluation_page import write_page
        from resnet_jax.distributed import is_primary
        from resnet_jax.errors import UserError
        from resnet_jax.evaluation.ensembles import read_ensemble
        from resnet_jax.evaluation.evaluate import evaluate_nets, write_result

    nets: Any = options.weights or []
    ensemble = options.ensemble
    if options.ensemble_config is not None:
        members, average = read_ensemble(options.ensemble_config)
        nets, ensemble = [*nets, *members], ensemble or average
    if not nets:
        raise UserError("give nets with --weights, --workdir or --ensemble-config")
    pictures: dict[int, Any] = {}
    with connected(options):
        result = evaluate_nets(
            nets,
            protocol=options.protocol,
            ensemble=ensemble,
            data=options.data,
            split=options.split,
            labels=options.labels,
            class_map=options.class_map,
            all_classes=options.all_classes,
            batch_size=options.batch_size,
            precise_batches=options.precise_batches,
            overrides=parse_overrides(options.rest),
            on_mistake=pictures.__setitem__ if options.html else None,
            **net_options(options),
        )
        if not is_primary():
            return
        if options.json:
            write_result(options.json, result)
        if options.html:
            write_page(options.html, result, pictures)
