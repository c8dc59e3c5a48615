"""Names and shapes of a model's arrays, as in "params/stem/conv/kernel".

A model that runs its blocks as a loop has the names of the unrolled one here, so files
do not depend on how the model computes.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, traverse_util
from flax import linen as nn

from resnet_jax.errors import UserError
from resnet_jax.models.factories import class_of
from resnet_jax.models.highway import HighwayNet
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stages import Stage
from resnet_jax.models.trees import stack_blocks, unstack_blocks
from resnet_jax.models.vgg import VGG
from resnet_jax.weights.torch_files import printable

Shape = tuple[int, ...]

SIDE = 256
"""Side of the images that models are traced with: enough for every pooling. Nothing of
that size is computed."""

_SHOWN = 2

# Where a file stores its first kernel, and the axis of the input channels.
STEMS = {
    "params/stem/conv/kernel": 2,
    "params/stem/conv1/kernel": 2,
    "params/stage1/conv/kernel": 2,
    "params/stage1/conv1/kernel": 2,
    "conv1.weight": 1,
    "conv1.0.weight": 1,
    "features.0.weight": 1,
}
# Where it stores its classifier, and the axis of the classes.
_HEADS = {"params/head/kernel": 1, "fc.weight": 0, "classifier.6.weight": 0}


def is_image_net(model: nn.Module) -> bool:
    """Whether a model takes images (n, h, w, channels); a subclass may not."""
    return type(model) in (ResNet, VGG, HighwayNet)


def flatten(variables: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The leaves of a tree of variables by flat name, with every block unrolled.

    Raises:
      UserError: a name in the tree is not a string, or has a slash.
    """
    tree = core.unfreeze(dict(variables))
    if type(model) is ResNet:
        tree = unstack_blocks(tree)
    leaves = traverse_util.flatten_dict(tree)
    for path in leaves:
        if not all(isinstance(part, str) and "/" not in part for part in path):
            raise UserError(
                f"the variables of {type(model).__name__} have the name {path}; name "
                "modules and variables without a slash"
            )
    return {"/".join(path): leaf for path, leaf in leaves.items()}


def unflatten(arrays: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The tree of variables of ``model.init``, from arrays by flat name."""
    tree = traverse_util.unflatten_dict(dict(arrays), sep="/")
    if type(model) is ResNet and model.scan:
        return stack_blocks(tree)
    return tree


def abstract_arrays(
    model: nn.Module, channels: int = 3, example: Any = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a model's variables by flat name.

    ``example`` is an input of the model, or its shape and dtype. Without it, images are
    the input; UserError if the model is not an image net of this library.
    """
    if example is not None:
        return _trace(model, example)
    if not is_image_net(model):
        raise UserError(
            f"the input of a {type(model).__name__} is unknown; give example, an input "
            "or a jax.ShapeDtypeStruct"
        )
    return _trace(model, _images(channels))


def fresh_head(
    model: nn.Module, rng: jax.Array, channels: int = 3, example: Any = None
) -> dict[str, Any]:
    """The classifier's arrays by flat name, as ``model.init(rng, ...)`` draws them.

    Its draws depend on its own name and shape alone, so one block per stage is enough.
    """
    small: Any = model
    if isinstance(small, ResNet) and class_of(small.stage) is Stage:
        small = small.clone(stage_sizes=(1,) * len(small.stage_sizes), scan=False)
    given = _images(channels) if example is None else example

    @jax.jit
    def draw(key: jax.Array) -> Any:
        # XLA drops the computation of everything else.
        variables = small.init(key, jnp.zeros_like(given))
        return {"params": {"head": variables["params"]["head"]}}

    return flatten(draw(rng), model)


def input_channels(arrays: Mapping[str, Any]) -> int:
    """Image channels of a file in either layout; 3 if its stem is unknown."""
    stem = _stem_kernel(arrays)
    return stem[1] if stem and stem[1] > 0 else 3


def stem_name(arrays: Mapping[str, Any]) -> str | None:
    """Where a file of either layout stores its first kernel; None if unknown."""
    found = (name for name in STEMS if name in arrays and len(arrays[name].shape) == 4)
    return next(found, None)


def classes(arrays: Mapping[str, Any]) -> int | None:
    """Classes of a file's classifier; None if it has none."""
    head = _head_kernel(arrays)
    return head[1] if head else None


def count_parameters(arrays: Mapping[str, Any]) -> int:
    """Number of trainable parameters in a file of either layout."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return sum(
        math.prod(array.shape)
        for name, array in arrays.items()
        if name.startswith("params/")
        or ("/" not in name and not name.endswith(statistics))
    )


def count_parameters_for(arrays: Mapping[str, Any], num_classes: int) -> int | None:
    """Parameters that a file's model would have with RGB images and other classes.

    None if the file has no classifier or no known stem.
    """
    stem, head = _stem_kernel(arrays), _head_kernel(arrays)
    if stem is None or head is None:
        return None
    # Each class has a column of the kernel and a bias.
    of_one_class = math.prod(head[0]) // max(1, head[1]) + 1
    of_one_channel = math.prod(stem[0]) // max(1, stem[1])
    more = (num_classes - head[1]) * of_one_class + (3 - stem[1]) * of_one_channel
    return count_parameters(arrays) + more


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """How names and shapes differ: "it lacks A and has extra B, C and 2 more".

    The text is empty if nothing differs.
    """
    names: dict[str, list[str]] = {"lacks": [], "has": [], "has extra": []}
    for name in differing(expected, found):
        shown = printable(name)
        if name not in found:
            names["lacks"].append(shown)
        elif name not in expected:
            names["has extra"].append(shown)
        else:
            shapes = (tuple(arrays[name].shape) for arrays in (found, expected))
            names["has"].append("{} of shape {} instead of {}".format(shown, *shapes))
    parts = [f"{verb} {_first(some)}" for verb, some in names.items() if some]
    return " and ".join(parts) and f"it {' and '.join(parts)}"


def differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The names that are in only one of both, or in two shapes, in order."""
    names = [
        name
        for name in {**expected, **found}
        if name not in expected
        or name not in found
        or tuple(found[name].shape) != tuple(expected[name].shape)
    ]
    return sorted(names, key=_order)


def _order(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """Parameters before statistics, and block 2 before block 10."""
    is_statistic = name.startswith("batch_stats/") or ".running_" in name
    words = re.findall(r"\d+|\D+", name)
    return is_statistic, [
        (len(word) if word.isdecimal() else 0, word) for word in words
    ]


def _first(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _trace(model: nn.Module, example: Any) -> dict[str, jax.ShapeDtypeStruct]:
    key = jax.random.key(0)
    return jax.eval_shape(lambda x: flatten(model.init(key, x), model), example)


def _images(channels: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, SIDE, SIDE, channels), jnp.float32)


def _stem_kernel(arrays: Mapping[str, Any]) -> tuple[Shape, int] | None:
    """Shape of the first convolution's kernel, and its input channels."""
    return _find(arrays, 4, STEMS)


def _head_kernel(arrays: Mapping[str, Any]) -> tuple[Shape, int] | None:
    """Shape of the classifier's kernel, and its classes."""
    return _find(arrays, 2, _HEADS)


def _find(
    arrays: Mapping[str, Any], ndim: int, axes: Mapping[str, int]
) -> tuple[Shape, int] | None:
    """The first array present: its shape, and the length of the axis given for it."""
    for name, axis in axes.items():
        if name in arrays and len(arrays[name].shape) == ndim:
            shape = tuple(arrays[name].shape)
            return shape, shape[axis]
    return None
