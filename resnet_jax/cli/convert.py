"""``resnet-jax convert``: weights of a file or a run, to a file in either layout."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from resnet_jax.errors import UserError

if TYPE_CHECKING:
    from resnet_jax.weights.load_save import NamedModel, WeightsLayout

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
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    import rich.console

    from resnet_jax.console import say
    from resnet_jax.storage import expand, is_remote
    from resnet_jax.weights import save_weights, shapes
    from resnet_jax.weights.load_save import check_suffix, load_named_model

    target = expand(target)
    check_suffix(str(target))
    if target.exists() and not force:
        raise UserError(f"{target} exists; give another path, or --force")
    if is_remote(source) or expand(source).is_dir():
        named = _from_run(source, model)
        layout = layout or "flax"
    else:
        named, found = load_named_model(source, model)
        layout = layout or ("flax" if found == "torch" else "torch")
    written = save_weights(
        target,
        named.variables,
        named.model,
        layout=layout,
        name=named.name,
        options=named.options,
    )
    say(
        rich.console.Console(),
        f"wrote {target}: {len(written)} arrays, "
        f"{shapes.count_parameters(written):,} parameters, {layout} layout",
    )


def _from_run(folder: str | os.PathLike[str], model: str | None) -> "NamedModel":
    """The model of a run's last checkpoint; the data need not exist."""
    from resnet_jax.config import model_options
    from resnet_jax.evaluation.saved_run import load_run
    from resnet_jax.weights.load_save import KEPT_OPTIONS, NamedModel

    run = load_run(folder)
    config = run.config.model
    if model is not None:
        raise UserError(f"workdir {folder} holds a {config.name}; leave --model out")
    options = model_options(config)
    kept = {name: options[name] for name in options if name in KEPT_OPTIONS}
    variables = {key: tree for key, tree in run.variables.items() if tree}
    return NamedModel(config.name, kept, run.model, variables)
