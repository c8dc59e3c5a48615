"""``resnet-jax convert``: weights of a file or a run, to a file in either layout."""

import argparse
import contextlib
import functools
import os
from pathlib import Path
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
    """Writes the weights of a file or a run to a file in either layout.

    Prints one line.

    Args:
      source: a file, a name that ``resnet_jax.weights.hub.locate`` knows, or a run's
        workdir, for the variables with which its last checkpoint is evaluated.
      target: the safetensors file to write.
      model: the model's name in the catalog; None means the name in the source, which
        our files, torchvision's names and workdirs have.
      layout: "flax" or "torch"; None means the opposite of the source's, and flax for
        a workdir.
      force: replace ``target`` if it exists.

    Raises:
      UserError: ``target`` exists, the model is unknown, or a fault of
        ``load_weights`` or ``save_weights``.
    """
    from resnet_jax.storage import is_remote
    from resnet_jax.weights import save_weights, shapes
    from resnet_jax.weights.load_save import SUFFIX, load_named_model

    target = Path(target).expanduser()
    if target.suffix != SUFFIX:
        raise UserError(
            f"{target} cannot be written: weights are written as safetensors; give a "
            f"path that ends in {SUFFIX}"
        )
    if target.exists() and not force:
        raise UserError(f"{target} exists; give another path, or --force")
    if is_remote(source) or Path(source).expanduser().is_dir():
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
    print(
        f"wrote {target}: {len(written)} arrays, "
        f"{shapes.count_parameters(written):,} parameters, {layout} layout"
    )


def _from_run(folder: str | os.PathLike[str], model: str | None) -> "NamedModel":
    """The model of a run's last checkpoint; the data need not exist."""
    from resnet_jax.config import model_options
    from resnet_jax.training.checkpoints import Checkpoints
    from resnet_jax.weights.load_save import KEPT_OPTIONS, NamedModel
    from resnet_jax.workdir import Workdir

    workdir = Workdir(folder)
    config = workdir.read_config()
    if config is None:
        raise UserError(
            f"{folder} is a folder without a run (config.json is missing); give a file "
            "of weights or a workdir of resnet-jax train"
        )
    if model is not None:
        raise UserError(
            f"workdir {folder} holds a {config.model.name}; leave --model out"
        )
    no_checkpoint = UserError(f"workdir {folder} holds no checkpoint yet")
    if not workdir.checkpoints.is_dir():
        raise no_checkpoint
    with Checkpoints(workdir.checkpoints, config.checkpoint) as checkpoints:
        if not checkpoints.steps():
            raise no_checkpoint
        step = checkpoints.steps()[-1]
        net, abstract = _abstract_state(config, workdir.checkpoints / str(step))
        state, _ = checkpoints.restore(step, abstract)
    options = model_options(config.model)
    kept = {name: options[name] for name in options if name in KEPT_OPTIONS}
    variables = {key: v for key, v in state.evaluation_variables().items() if v}
    return NamedModel(config.model.name, kept, net, variables)


def _abstract_state(config: Any, checkpoint: Path) -> tuple[Any, Any]:
    """The model of a checkpoint, and the shapes of its state on one device.

    The checkpoint gives the classes and channels, so no data are needed.
    """
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp
    from etils import epath
    from flax import traverse_util

    from resnet_jax.config import derive, model_options
    from resnet_jax.data.transforms import PixelStatistics
    from resnet_jax.models import create_model
    from resnet_jax.training.optimizer import make_optimizer
    from resnet_jax.training.schedule import Schedule
    from resnet_jax.training.state import init_state
    from resnet_jax.weights import shapes

    try:
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            tree = handler.metadata(epath.Path(checkpoint / "state")).tree
        leaves = traverse_util.flatten_dict({"params": tree["params"]}, sep="/")
        params: dict[str, Any] = leaves
        mean = tree["statistics"]["mean"].shape
    except Exception as error:
        # A damaged file may raise anything.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"checkpoint {checkpoint} is damaged: {reason[:160]}; delete it to use "
            "the previous one"
        ) from error
    net = create_model(
        config.model.name,
        num_classes=shapes.classes(params),
        **model_options(config.model),
    )
    state = functools.partial(
        init_state,
        net,
        make_optimizer(config.optimizer, config.model.frozen),
        # The number of examples changes the schedule's steps, but not its state.
        Schedule(config.optimizer, config.schedule, derive(config, 1)),
        image_shape=(shapes.SIDE, shapes.SIDE, shapes.input_channels(params)),
        seed=config.seed,
        averaged=config.optimizer.ema_decay is not None,
    )
    pixels: Any = jax.ShapeDtypeStruct(mean, jnp.float32)
    abstract = jax.eval_shape(state, PixelStatistics(mean=pixels, std=pixels))
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return net, jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one_device),
        abstract,
    )
