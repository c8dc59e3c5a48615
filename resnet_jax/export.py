"""Trained nets as files that run without this library."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import export, lax

from resnet_jax.data.transforms import PixelStatistics, normalize, to_unit
from resnet_jax.errors import UserError
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.evaluation.protocols import Center
from resnet_jax.models import fold_batch_norm
from resnet_jax.models.catalog import catalog_entry
from resnet_jax.models.platforms import compiling_for
from resnet_jax.storage import expand, refuse_existing, writing

PLATFORMS = ("cpu", "cuda", "tpu")
"""Where an artefact runs; it holds a program for each."""
SUFFIX = ".jax"


def export_net(
    net: TrainedNet,
    path: str | os.PathLike[str],
    *,
    fold: bool = True,
    dtype: Any = None,
    force: bool = False,
) -> dict[str, Any]:
    """Writes a net as one file that needs jax alone, and facts about it as JSON.

    The file is a serialised ``jax.export.Exported``; see ``serialize``. Beside
    ``net.jax``, ``net.json`` holds the facts: input and output, the view of an image
    that the net expects, class names, and where the net came from.

    Args:
      net: from ``load_net``.
      path: ends in .jax.
      fold: fold batch normalisation into the convolutions where possible.
      dtype: of convolutions and maps; None keeps the net's own. Logits are float32.
      force: replace the files if they exist.

    Returns:
      The facts.

    Raises:
      UserError: another ending, a file that exists, or one that cannot be written.
    """
    target = expand(path)
    _check_suffix(target.suffix, path)
    facts_file = target.with_suffix(".json")
    if not target.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {target.parent}")
    for file in (target, facts_file):
        refuse_existing(file, force)
    shape = image_shape(net)
    content = serialize(
        net.model, net.variables, net.statistics, shape, fold=fold, dtype=dtype
    )
    (outputs,) = export.deserialize(bytearray(content)).out_avals
    facts = {
        "format": "jax.export",
        "jax": jax.__version__,
        "platforms": PLATFORMS,
        "input": {"dtype": "uint8", "shape": ["batch", *shape]},
        "output": {"dtype": "float32", "shape": ["batch", outputs.shape[1]]},
        "output_is": "features" if net.num_classes is None else "logits",
        "view": net.protocol.to_json(),
        "class_names": net.class_names,
        "model": {"name": net.name, "options": net.options},
        "source": net.source,
        "checksum": net.checksum,
    }
    with writing(target) as file:
        file.write_bytes(content)
    with writing(facts_file) as file:
        file.write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def serialize(
    model: nn.Module,
    variables: Mapping[str, Any],
    statistics: PixelStatistics,
    image_shape: tuple[int, int, int],
    *,
    fold: bool = True,
    dtype: Any = None,
) -> bytes:
    """A net as a serialised ``jax.export.Exported``, with its weights inside.

    ``jax.export.deserialize(bytearray(content)).call(images)`` maps uint8 images (n, h,
    w, c), for any n, to float32 logits (n, k). It normalises the images itself.

    Args:
      model: a Linen module; ``model.apply(variables, images, train=False)`` returns
        logits.
      variables: its params and batch_stats.
      statistics: of the pixels, see ``PixelStatistics``.
      image_shape: (h, w, c).
      fold: see ``export_net``.
      dtype: see ``export_net``.
    """
    if dtype is not None and hasattr(model, "dtype"):
        model = model.clone(dtype=jnp.dtype(dtype))
    if fold:
        model, variables = folded(model, variables)
    forward = _forward(model)
    # Numbers become constants of the program, wherever they are now.
    variables, statistics = jax.device_get((variables, statistics))

    def logits(images: jax.Array) -> jax.Array:
        return forward(variables, normalize(to_unit(images), statistics))

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8)
    return bytes(
        export.export(jax.jit(logits), platforms=PLATFORMS)(images).serialize()
    )


def folded(
    model: nn.Module, variables: Mapping[str, Any]
) -> tuple[Any, Mapping[str, Any]]:
    """``fold_batch_norm``, or the net as it is where nothing can be folded."""
    try:
        return fold_batch_norm(model, variables)  # type: ignore[arg-type]
    except UserError:
        return model, variables


def image_shape(net: TrainedNet) -> tuple[int, int, int]:
    """The images (h, w, c) of the net's own view."""
    if isinstance(net.protocol, Center):
        return net.protocol.size, net.protocol.size, net.channels
    height, width, channels = np.shape(net.statistics.mean)
    if (height, width) == (1, 1):
        height = width = catalog_entry(net.name).image_size
    return height, width, channels


def _forward(model: Any) -> Any:
    """The function of variables and images, in the form that suits each platform."""

    def on(platform: str) -> Any:
        def apply(variables: Any, images: jax.Array) -> jax.Array:
            with compiling_for(platform):
                return model.apply(variables, images, train=False)

        return apply

    def forward(variables: Any, images: jax.Array) -> jax.Array:
        return lax.platform_dependent(
            variables, images, cpu=on("cpu"), cuda=on("gpu"), default=on("tpu")
        )

    return forward


def _check_suffix(suffix: str, path: str | os.PathLike[str]) -> None:
    if suffix == SUFFIX:
        return
    advice = "give a path that ends in .jax"
    if suffix == ".safetensors":
        advice = "weights alone are written by resnet-jax convert"
    elif suffix == ".onnx":
        advice = "docs/export.md says how to make ONNX from weights in torch's layout"
    raise UserError(f"{path} cannot be written as a program: {advice}")
