"""From a file of weights, or a run's checkpoint, to a file in either layout."""

import contextlib
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from flax import traverse_util

from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.storage import is_remote
from resnet_jax.weights import shapes
from resnet_jax.weights.files import read_arrays
from resnet_jax.weights.hub import TORCHVISION_PREFIX, locate
from resnet_jax.weights.load_save import (
    SUFFIX,
    Layout,
    file_layout,
    fitting_models,
    save_weights,
    variables_of,
    without_counters,
)

# The options of create_model that say what a net computes with given weights, and the
# types of their values.
_OPTIONS: dict[str, tuple[type, ...]] = {
    "shortcut": (str,),
    "stride_version": (str,),
    "block_convs": (int,),
    "squeeze_excite": (bool,),
    "normalization": (str,),
    "batch_norm_epsilon": (float, int),
}


class _Net(NamedTuple):
    """A net with its weights, and how ``create_model`` makes it."""

    name: str
    options: dict[str, Any]
    model: Any
    variables: Mapping[str, Any]


def convert_weights(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    model: str | None = None,
    layout: Layout | None = None,
    force: bool = False,
    console: rich.console.Console | None = None,
) -> None:
    """Writes the weights of a file or a run in another layout; prints one line.

    Args:
      source: a file, a name that ``locate`` knows, or the workdir of a run, of which
        the last checkpoint's variables for evaluation are taken.
      target: the safetensors file to write.
      model: the net's name in the catalog; by default the one that the file names (one
        of ours, or of torchvision by name), or the workdir's. Its number of classes and
        the images' channels are those of the source.
      layout: "flax" or "torch"; by default the other one than the file's, and flax for
        a workdir.
      force: replace ``target`` if it is there.
      console: where to print; standard output by default.

    Raises:
      UserError: ``target`` is there already, the net is not known, or as
        ``load_weights`` and ``save_weights`` say.
    """
    console = console or rich.console.Console()
    target = Path(target).expanduser()
    _refuse_target(target, force)
    if is_remote(source) or Path(source).expanduser().is_dir():
        net = _from_run(source, model)
        layout = layout or "flax"
    else:
        net, found = _from_file(source, model)
        layout = layout or ("flax" if found == "torch" else "torch")
    written = save_weights(
        target,
        net.variables,
        net.model,
        layout=layout,
        name=net.name,
        options=net.options,
    )
    console.print(
        f"wrote {target}: {len(written)} arrays, "
        f"{shapes.count_parameters(written):,} parameters, {layout} layout",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _refuse_target(target: Path, force: bool) -> None:
    if target.suffix != SUFFIX:
        raise UserError(
            f"{target} cannot be written: weights are written as safetensors; give a "
            f"path that ends in {SUFFIX}"
        )
    if target.exists() and not force:
        raise UserError(f"{target} is there already; give another path, or --force")


def _from_file(
    source: str | os.PathLike[str], model: str | None
) -> tuple[_Net, Layout]:
    """The net of a file, and the file's layout."""
    text = os.fspath(source)
    arrays, metadata = read_arrays(locate(source))
    layout = file_layout(text, arrays, metadata)
    options: dict[str, Any] = {}
    if model is None:
        model, options = _named(text, arrays, layout, metadata)
    net = create_model(model, num_classes=shapes.classes(arrays), **options)
    variables = variables_of(text, arrays, layout, net)
    return _Net(model, options, net, variables), layout


def _named(
    source: str,
    arrays: Mapping[str, np.ndarray],
    layout: Layout,
    metadata: Mapping[str, str],
) -> tuple[str, dict[str, Any]]:
    """Name and options of the net that a file says it is of."""
    if "model" in metadata:
        return metadata["model"], _options(source, metadata)
    if source.startswith(TORCHVISION_PREFIX):
        return source.removeprefix(TORCHVISION_PREFIX).partition(".")[0], {}
    fitting = list(fitting_models(without_counters(arrays, layout), layout))
    hint = f"; its arrays fit {' or '.join(fitting[:3])}" if fitting else ""
    raise UserError(
        f"{source} does not say which net it is of: give --model NAME, one of "
        f"resnet_jax.list_models(){hint}"
    )


def _options(source: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        options = json.loads(metadata.get("model_options", "{}"))
        known = isinstance(options, dict) and all(
            isinstance(value, _OPTIONS.get(name, ())) for name, value in options.items()
        )
    except ValueError:
        known = False
    if not known:
        raise UserError(
            f"{source} names options of its net that are not known here; give --model "
            "NAME to leave them out, or convert it with the resnet_jax that wrote it"
        )
    return options


def _from_run(folder: str | os.PathLike[str], model: str | None) -> _Net:
    """The net of a run's last checkpoint; the data need not be there."""
    # Imported here: only this form needs the libraries of training.
    from resnet_jax.checkpoints import Checkpoints
    from resnet_jax.config import model_options
    from resnet_jax.workdir import Workdir

    workdir = Workdir(folder)
    config = workdir.read_config()
    if config is None:
        raise UserError(
            f"{folder} is a folder and no run (it has no config.json); give a file of "
            "weights or a workdir of resnet-jax train"
        )
    if model is not None:
        raise UserError(
            f"workdir {folder} says itself that its net is {config.model.name}; leave "
            "--model out"
        )
    if not workdir.checkpoints.is_dir():
        raise UserError(f"workdir {folder} holds no checkpoint yet; train it further")
    with Checkpoints(workdir.checkpoints, config.checkpoint) as checkpoints:
        if not checkpoints.steps():
            raise UserError(
                f"workdir {folder} holds no checkpoint yet; train it further"
            )
        step = checkpoints.steps()[-1]
        net, abstract = _abstract_state(config, workdir.checkpoints / str(step))
        state, _ = checkpoints.restore(step, abstract)
    options = {
        name: value
        for name, value in model_options(config.model).items()
        if name in _OPTIONS
    }
    variables = {key: v for key, v in state.evaluation_variables().items() if v}
    return _Net(config.model.name, options, net, variables)


def _abstract_state(config: Any, checkpoint: Path) -> tuple[Any, Any]:
    """The net of a checkpoint, and the shapes of its state for one device.

    The classes and channels come out of the checkpoint, so that no data are needed.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    from resnet_jax.config import derive, model_options
    from resnet_jax.data.transforms import PixelStatistics
    from resnet_jax.training.optimizer import make_optimizer
    from resnet_jax.training.schedule import Schedule
    from resnet_jax.training.state import init_state

    try:
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            tree = handler.metadata(epath.Path(checkpoint / "state")).tree
        leaves = traverse_util.flatten_dict({"params": tree["params"]}, sep="/")
        params: dict[str, Any] = leaves
        mean = tree["statistics"]["mean"].shape
    except Exception as error:
        # Whatever stands in a damaged file may come up as any exception.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"checkpoint {checkpoint} is damaged: {reason[:160]}; delete it to take "
            "the one before"
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
        # The number of examples sets the schedule's steps, and not its state.
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
