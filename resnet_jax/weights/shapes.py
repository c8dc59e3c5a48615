"""The arrays of a net by flat names, "params/stem/conv/kernel", and their shapes.

A net that runs its blocks as a loop has the names of the unrolled one here, so that
files do not depend on how a net is computed.
"""

import functools
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

Shape = tuple[int, ...]

SIDE = 256
"""Of the images that nets are traced with: enough for their poolings. Nothing of that
size is ever computed."""

_SHOWN = 2


def is_image_net(model: nn.Module) -> bool:
    """Whether it is a net of this library, of which it is known what it is called with.

    A subclass may be called with anything.
    """
    return type(model) in (ResNet, VGG, HighwayNet)


def flatten(variables: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The leaves of a tree of variables by their flat names, blocks one by one.

    Raises:
      UserError: a name in the tree is no text, or has a slash.
    """
    tree = core.unfreeze(dict(variables))
    if type(model) is ResNet:
        tree = unstack_blocks(tree)
    leaves = traverse_util.flatten_dict(tree)
    for path in leaves:
        if not all(isinstance(part, str) and "/" not in part for part in path):
            raise UserError(
                f"the variables of {type(model).__name__} have the name {path}, which "
                "no file can hold: name modules and variables without a slash"
            )
    return {"/".join(path): leaf for path, leaf in leaves.items()}


def unflatten(arrays: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The tree of variables as the model's ``init`` gives it, of flat names."""
    tree = traverse_util.unflatten_dict(dict(arrays), sep="/")
    if type(model) is ResNet and model.scan:
        return stack_blocks(tree)
    return tree


def abstract_arrays(
    model: nn.Module, channels: int = 3, example: Any = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a model's variables by their flat names.

    Args:
      model: a net of this library, or any module with ``example``.
      channels: of the images.
      example: an input of the model, or its shape and dtype.

    Raises:
      UserError: it is unknown what the model is called with.
    """
    if example is not None:
        return _trace(model, example)
    if not is_image_net(model):
        raise UserError(
            f"it is unknown what a {type(model).__name__} is called with; give "
            "example, an input of it or a jax.ShapeDtypeStruct"
        )
    # All blocks behind a stage's first are equal, and tracing them is slow.
    small = _with_blocks(model, 2)
    trace = _trace_again if _is_hashable(small) else _trace
    arrays = trace(small, _images(channels))
    return {
        copy: leaf for name, leaf in arrays.items() for copy in _copies(model, name)
    }


def fresh_head(
    model: nn.Module, rng: jax.Array, channels: int = 3, example: Any = None
) -> dict[str, Any]:
    """The classifier's arrays by flat names, as ``model.init`` draws them from ``rng``.

    Its draws depend on its own name and shape alone, so that few blocks will do.
    """
    small = _with_blocks(model, 1)
    given = _images(channels) if example is None else example

    @jax.jit
    def draw(key: jax.Array) -> Any:
        # All but the head is computed in vain, and XLA leaves it out.
        variables = small.init(key, jnp.zeros_like(given))
        return {"params": {"head": variables["params"]["head"]}}

    return flatten(draw(rng), model)


def input_channels(arrays: Mapping[str, Any]) -> int:
    """Channels of the images that a file's net takes; 3 where the file does not tell.

    Args:
      arrays: of either layout, by name; anything with a shape.
    """
    stem = _stem_kernel(arrays)
    return stem[1] if stem and stem[1] > 0 else 3


def classes(arrays: Mapping[str, Any]) -> int | None:
    """Classes of a file's classifier; None where it has none."""
    head = _head_kernel(arrays)
    return head[1] if head else None


def count_parameters(arrays: Mapping[str, Any]) -> int:
    """Trainable numbers in a file of either layout."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return sum(
        math.prod(array.shape)
        for name, array in arrays.items()
        if name.startswith("params/")
        or ("/" not in name and not name.endswith(statistics))
    )


def count_parameters_for(arrays: Mapping[str, Any], num_classes: int) -> int | None:
    """Trainable numbers that a file's net would have for RGB and so many classes.

    None where the file has no classifier or no known stem.
    """
    stem, head = _stem_kernel(arrays), _head_kernel(arrays)
    if stem is None or head is None:
        return None
    # A bias stands beside each class's column of the kernel.
    of_one_class = math.prod(head[0]) // max(1, head[1]) + 1
    of_one_channel = math.prod(stem[0]) // max(1, stem[1])
    more = (num_classes - head[1]) * of_one_class + (3 - stem[1]) * of_one_channel
    return count_parameters(arrays) + more


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """How the names and shapes that are there differ from the expected, in words.

    Args:
      expected: anything with a shape, by name.
      found: the same.

    Returns:
      "it lacks A and has B, C and 2 more besides"; empty where nothing differs.
    """
    names = differing(expected, found)
    missing = [shown(name) for name in names if name not in found]
    besides = [shown(name) for name in names if name not in expected]
    changed = [
        f"{shown(name)} of shape {tuple(found[name].shape)} in place of "
        f"{tuple(expected[name].shape)}"
        for name in names
        if name in expected and name in found
    ]
    parts = []
    if missing:
        parts.append(f"lacks {_first(missing)}")
    if changed:
        parts.append(f"has {_first(changed)}")
    if besides:
        parts.append(f"has {_first(besides)} besides")
    return " and ".join(parts) and f"it {' and '.join(parts)}"


def differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The names that only one of both has, or has in another shape, in order."""
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


def shown(name: str) -> str:
    """A name out of a file, fit to be printed."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return text if len(text) <= 100 else f"{text[:100]}..."


def _first(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _has_equal_blocks(model: Any) -> bool:
    """Whether the blocks behind the first of a stage have equal arrays."""
    return type(model) is ResNet and class_of(model.stage) is Stage


def _with_blocks(model: Any, most: int) -> Any:
    """The net with no more blocks in a stage than ``most``, where they are equal."""
    if not _has_equal_blocks(model):
        return model
    sizes = tuple(min(size, most) for size in model.stage_sizes)
    return model.clone(stage_sizes=sizes, scan=False, remat=False)


def _trace(model: nn.Module, example: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what ``init`` gives for an example; computes nothing."""
    key = jax.random.key(0)
    return jax.eval_shape(lambda x: flatten(model.init(key, x), model), example)


# A net is often saved again, and a file that does not fit is compared with several.
_trace_again = functools.lru_cache(maxsize=64)(_trace)


def _is_hashable(model: nn.Module) -> bool:
    """Whether no field of the model is a list or the like."""
    try:
        hash(model)
    except TypeError:
        return False
    return True


def _images(channels: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, SIDE, SIDE, channels), jnp.float32)


def _copies(model: Any, name: str) -> list[str]:
    """The names in a whole net for which one in ``_with_blocks(model, 2)`` stands."""
    match = re.match(r"\w+/stage(\d+)/block2/", name)
    if match is None or not _has_equal_blocks(model):
        return [name]
    numbers = range(2, model.stage_sizes[int(match[1]) - 1] + 1)
    return [name.replace("/block2/", f"/block{number}/", 1) for number in numbers]


def _stem_kernel(arrays: Mapping[str, Any]) -> tuple[Shape, int] | None:
    """The shape of the first convolution's kernel, and its input channels."""
    return _find(
        arrays,
        4,
        {
            "params/stem/conv/kernel": 2,
            "params/stem/conv1/kernel": 2,
            "params/stage1/conv/kernel": 2,
            "params/stage1/conv1/kernel": 2,
            "conv1.weight": 1,
            "conv1.0.weight": 1,
            "features.0.weight": 1,
        },
    )


def _head_kernel(arrays: Mapping[str, Any]) -> tuple[Shape, int] | None:
    """The shape of the classifier's kernel, and its classes."""
    return _find(
        arrays,
        2,
        {"params/head/kernel": 1, "fc.weight": 0, "classifier.6.weight": 0},
    )


def _find(
    arrays: Mapping[str, Any], ndim: int, axes: Mapping[str, int]
) -> tuple[Shape, int] | None:
    """Shape and one axis's length of the first of these arrays that is there."""
    for name, axis in axes.items():
        if name in arrays and len(arrays[name].shape) == ndim:
            shape = tuple(arrays[name].shape)
            return shape, shape[axis]
    return None
