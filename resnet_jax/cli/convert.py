"""``resnet-jax convert``: weights of a file or a run, to a file in either layout."""

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from resnet_jax.errors import UserError

if TYPE_CHECKING:
    from resnet_jax.weights.load_save import WeightsLayout

_DESCRIPTION = """Write weights in another layout, torch's or Flax's.

  resnet-jax convert torchvision:resnet50 resnet50.safetensors
  resnet-jax convert runs/digits digits.safetensors
  resnet-jax convert digits.safetensors digits_torch.safetensors

The flax layout names arrays as the model does; torchvision and timm load the torch
layout. IN sets the number of classes and image channels.
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the parser of ``resnet-jax``."""
    parser = commands.add_parser(
        "convert",
        help="convert weights from and to the layout of torchvision and timm",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "source",
        metavar="IN",
        help="a safetensors or torch.save file, hf-hub:OWNER/NAME, "
        "torchvision:MODEL, or a run's workdir (for its last checkpoint)",
    )
    parser.add_argument("target", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a name of resnet_jax.list_models(); needed if IN does not contain it",
    )
    parser.add_argument(
        "--layout",
        choices=("flax", "torch"),
        help="layout of OUT (default: the opposite of IN; flax for a workdir)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    convert_weights(
        options.source,
        options.target,
        model=options.model,
        layout=options.layout,
        force=options.force,
    )


def convert_weights(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    model: str | None = None,
    layout: "WeightsLayout | None" = None,
    force: bool = False,
) -> None:
    """Writes the weights of a file or a run to a file in either layout; prints a line.

    Args:
      source: a file, a name that ``resnet_jax.weights.hub.locate`` knows, or a run's
        workdir, for the variables with which its last checkpoint is evaluated.
      target: the safetensors file to write.
      model: the model's name in the catalog; None means the name in the source.
      layout: "flax" or "torch"; None means the opposite of the source's, and flax for
        a workdir.
      force: replace ``target`` if it exists.

    Raises:
      UserError: ``target`` exists, the model is unknown, or a fault of
        ``load_weights`` or ``save_weights``.
    """
    from resnet_jax.console import make_console, say
    from resnet_jax.evaluation.nets import PREPROCESSING, is_workdir, load_net
    from resnet_jax.storage import expand, refuse_existing
    from resnet_jax.weights import save_weights, shapes
    from resnet_jax.weights.load_save import check_suffix, load_named_model

    target = expand(target)
    check_suffix(str(target))
    refuse_existing(target, force)
    if is_workdir(source):
        if model is not None:
            raise UserError(f"workdir {source} knows its model; leave --model out")
        net: Any = load_net(source)
        metadata = {PREPROCESSING: json.dumps(net.preprocessing())}
        layout = layout or "flax"
    else:
        net = load_named_model(source, model)
        kept = net.metadata.keys() & {PREPROCESSING}
        metadata = {key: net.metadata[key] for key in kept}
        layout = layout or ("flax" if net.layout == "torch" else "torch")
    written = save_weights(
        target,
        net.variables,
        net.model,
        layout=layout,
        name=net.name,
        options=net.options,
        metadata=metadata,
    )
    say(
        make_console(),
        f"wrote {target}: {len(written)} arrays, "
        f"{shapes.count_parameters(written):,} parameters, {layout} layout",
    )
