"""Load and save a model's variables, in Flax's layout or torch's.

The flax layout names arrays as the model does: "params/stem/conv/kernel". The torch
layout is the one of torchvision and timm (``torch_layout``). Files do not depend on
whether the model runs its blocks as a loop.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.models.catalog import CATALOG, catalog_entry
from resnet_jax.models.vgg import VGG
from resnet_jax.weights import shapes
from resnet_jax.weights.files import read_arrays, write_safetensors
from resnet_jax.weights.hub import TORCHVISION_PREFIX, locate
from resnet_jax.weights.prefixes import (
    seen_prefixes,
    shown,
    unwrapped,
    without_prefix,
)
from resnet_jax.weights.torch_files import printable
from resnet_jax.weights.torch_layout import (
    COUNTER,
    StoredArray,
    counters,
    torch_layout,
    torch_module,
)

WeightsLayout = Literal["flax", "torch"]
LAYOUTS: tuple[WeightsLayout, ...] = ("flax", "torch")

_FORMAT = "resnet_jax"  # "format" in the metadata of files in the flax layout
_FORMAT_VERSION = "1"
_TORCH_FORMAT = "pt"  # the same in files that torch loads

# Nets of a file that are compared with the catalog for the advice in an error.
_MAX_NETS = 4

# Last parts of names of counters: of batches, and of averaged weights (AveragedModel).
_COUNTERS = (COUNTER, "n_averaged")

# A block's first convolution in either layout. The group is its stage.
_FIRST_CONV = re.compile(r"(?:params/stage|layer)(\d+)(?:/block|\.)\d+[./]conv1\b")
_BOTTLENECKS = ("bottleneck_", "preact_bottleneck_")

# Options of create_model that change what a model computes with given weights, and the
# types of their values. Files keep them.
KEPT_OPTIONS: dict[str, tuple[type, ...]] = {
    "shortcut": (str,),
    "stride_version": (str,),
    "block_convs": (int,),
    "squeeze_excite": (bool,),
    "normalization": (str,),
    "batch_norm_epsilon": (float, int),
}


class NamedModel(NamedTuple):
    """A file's model: ``create_model(name, **options)`` makes it.

    Attributes:
      layout: of the file.
      metadata: of the file; empty if it has none.
    """

    name: str
    options: dict[str, Any]
    model: nn.Module
    variables: Mapping[str, Any]
    layout: WeightsLayout
    metadata: Mapping[str, str]


def load_weights(
    path_or_name: str | os.PathLike[str],
    model: nn.Module,
    *,
    new_head: bool = False,
    rng: jax.Array | None = None,
    example: Any = None,
    notify: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Loads a model's variables from a file of either layout.

    The file must hold every array of the model in its shape, and nothing else. Only
    torch's counters (``num_batches_tracked``, ``n_averaged``) are ignored, and the
    classifier if ``new_head`` is set or the model has none. Prefixes such as "module."
    and "model." of torch's names are removed.

    Args:
      path_or_name: a safetensors or torch.save file, or a name such as
        "hf-hub:timm/resnet18.a1_in1k" or "torchvision:resnet50" (see ``locate``).
      model: a model of this library, or, for the flax layout, any module.
      new_head: ignore the file's classifier and initialise a fresh one, to fine-tune
        on other classes.
      rng: key of the fresh classifier, which equals that of ``model.init(rng, ...)``;
        None means ``jax.random.key(0)``.
      example: an input, or its ``jax.ShapeDtypeStruct``. Other modules need it. For
        image nets it sets the number of image channels, which is the file's without it.
        Weights for RGB images then load for grey ones, with the first kernels summed
        over their channels, and weights for grey images for RGB, with a third of the
        kernel for each channel, as timm does: the response to a grey image stays.
      notify: receives a sentence if the first convolution is adapted so.

    Returns:
      The tree of ``model.init``, in float32 whatever the file's dtype: exact from
      float16 and bfloat16, bit for bit from float32.

    Raises:
      UserError: the file is missing, damaged, asks for more than arrays, does not
        match the model, or holds a number that is not finite.
    """
    source = os.fspath(path_or_name)
    arrays, layout, _ = _read(source)
    if example is not None and shapes.is_image_net(model):
        arrays = _adapted(source, arrays, example.shape[-1], notify)
        example = None
    return _variables(source, arrays, layout, model, new_head, rng, example)


def save_weights(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    model: nn.Module,
    *,
    layout: WeightsLayout = "flax",
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """Saves a model's variables as a safetensors file, complete or not at all.

    torchvision and timm take the torch layout through ``safetensors.torch.load_file``
    and ``load_state_dict(strict=True)``. Both layouts load again bit for bit.

    Args:
      path: ends in .safetensors; an existing file is replaced.
      variables: of ``model``, on any devices.
      model: a model of this library, or, for the flax layout, any module, whose
        variables are written unchecked.
      layout: "flax" or "torch".
      name: the model's name in the catalog, kept for ``resnet-jax convert``.
      options: of ``create_model``, kept with the name; JSON values.
      metadata: other texts to keep.

    Returns:
      The arrays as written, by name.

    Raises:
      UserError: the file cannot be written, the variables do not match the model or
        are not finite, or torchvision and timm have no such model.
    """
    path = os.fspath(path)
    if layout not in LAYOUTS:
        raise UserError(
            f"unknown layout {layout!r} of weights; valid are {', '.join(LAYOUTS)}"
        )
    check_suffix(path)
    host = shapes.flatten(jax.device_get(variables), model)
    arrays = {key: np.asarray(leaf) for key, leaf in host.items()}
    if shapes.is_image_net(model):
        expected = shapes.abstract_arrays(model, shapes.input_channels(arrays))
        if difference := shapes.differences(expected, arrays):
            raise UserError(
                f"{path} cannot be written: the variables do not match this "
                f"{type(model).__name__}: {difference}; give all variables of the "
                "model, and nothing else"
            )
        arrays = {key: arrays[key] for key in expected}
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(
                f"{path} cannot be written: {key} is not finite; give variables from "
                "an earlier step"
            )
    texts = {"format": _FORMAT, "format_version": _FORMAT_VERSION}
    if layout == "torch":
        table = torch_layout(model, arrays)
        arrays = {table[key].key: table[key].to_file(arrays[key]) for key in table}
        arrays |= counters(table)
        texts = {"format": _TORCH_FORMAT}
    if name is not None:
        texts["model"] = name
        texts["model_options"] = json.dumps(dict(options or {}))
    write_safetensors(path, arrays, {**(metadata or {}), **texts})
    return arrays


def check_suffix(path: str) -> None:
    """Raises UserError unless a file of weights may be written under this name."""
    if not path.endswith(".safetensors"):
        raise UserError(
            f"{path} cannot be written: weights are written as safetensors; give a "
            "path that ends in .safetensors"
        )


def load_named_model(
    source: str | os.PathLike[str],
    name: str | None = None,
    suggested: str | None = None,
) -> NamedModel:
    """Loads a file's weights and the model that they belong to.

    Args:
      source: a file or a name that ``locate`` knows.
      name: the model's name in the catalog; None means the one in the file's metadata
        or in its torchvision name. The file sets the number of classes and channels.
      suggested: a name for a file that has none.
    """
    text = os.fspath(source)
    arrays, layout, metadata = _read(text)
    options: dict[str, Any] = {}
    if name is None and "model" in metadata:
        name, options = metadata["model"], _kept_options(text, metadata)
    elif name is None and text.startswith(TORCHVISION_PREFIX):
        name = text.removeprefix(TORCHVISION_PREFIX).partition(".")[0]
    elif name is None and suggested is not None:
        name = suggested
    elif name is None:
        fitting = _fitting_models(arrays, layout)
        hint = f"; its arrays fit {' or '.join(fitting[:3])}" if fitting else ""
        raise UserError(
            f"{source} does not name its model: give --model NAME, one of "
            f"resnet_jax.list_models(){hint}"
        )
    model = create_model(name, num_classes=shapes.classes(arrays), **options)
    variables = _variables(text, arrays, layout, model)
    return NamedModel(name, options, model, variables, layout, metadata)


def _kept_options(source: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        options = json.loads(metadata.get("model_options", "{}"))
        if isinstance(options, dict) and all(
            isinstance(value, KEPT_OPTIONS.get(name, ()))
            for name, value in options.items()
        ):
            return options
    raise UserError(
        f"{source} names unknown options of its model; give --model NAME to ignore "
        "them, or convert it with the resnet_jax that wrote it"
    )


def _read(source: str) -> tuple[dict[str, np.ndarray], WeightsLayout, dict[str, str]]:
    """A file's arrays without torch's counters of batches, its layout and metadata."""
    arrays, metadata = read_arrays(locate(source))
    if not arrays:
        raise UserError(f"{source} holds no arrays; give a file of weights")
    is_ours = metadata.get("format") == _FORMAT
    version = metadata.get("format_version")
    if is_ours and version != _FORMAT_VERSION:
        raise UserError(
            f"{source} has version {version} of the format {_FORMAT}, but only version "
            f"{_FORMAT_VERSION} is known; load it with the resnet_jax that wrote it"
        )
    if is_ours or all("/" in name for name in arrays):
        return arrays, "flax", metadata
    kept = {key: a for key, a in arrays.items() if key.split(".")[-1] not in _COUNTERS}
    return unwrapped(kept), "torch", metadata


def _variables(
    source: str,
    arrays: Mapping[str, np.ndarray],
    layout: WeightsLayout,
    model: nn.Module,
    new_head: bool = False,
    rng: jax.Array | None = None,
    example: Any = None,
) -> dict[str, Any]:
    """``load_weights`` from a file's arrays; ``source`` names the file in errors."""
    channels = shapes.input_channels(arrays)
    expected = shapes.abstract_arrays(model, channels, example)
    table = _table(source, layout, model, expected)
    kept = arrays
    if new_head:
        is_head = [name for name in table if name.startswith("params/head/")]
        if not is_head:
            raise UserError(
                f"this {type(model).__name__} has no classifier; leave new_head out"
            )
        table = {name: table[name] for name in table if name not in is_head}
    if new_head or getattr(model, "num_classes", 0) is None:
        left_out = _classifier(layout, model, new_head)
        kept = {key: arrays[key] for key in arrays if not key.startswith(left_out)}
    in_file = _by_key(table)
    if difference := shapes.differences(in_file, kept):
        raise UserError(
            f"{source} does not match the {type(model).__name__}: {difference}; "
            + _advice(layout, model, in_file, kept, arrays)
        )
    loaded: dict[str, Any] = {
        name: stored.from_file(
            checked_array(source, stored.key, kept[stored.key], expected[name].dtype)
        )
        for name, stored in table.items()
    }
    if new_head:
        key = jax.random.key(0) if rng is None else rng
        loaded |= shapes.fresh_head(model, key, channels, example)
    whole = {name: jnp.asarray(loaded[name]) for name in expected}
    return shapes.unflatten(whole, model)


def _adapted(
    source: str,
    arrays: dict[str, np.ndarray],
    channels: int,
    notify: Callable[[str], object],
) -> dict[str, np.ndarray]:
    """The file's arrays for images with this number of channels, see load_weights."""
    before = shapes.input_channels(arrays)
    stem = shapes.stem_name(arrays)
    if stem is None or channels == before:
        return arrays
    if {before, channels} != {1, 3}:
        raise UserError(
            f"{source} is for images of {before} channels, but these have {channels}: "
            f"its {printable(stem)} has the shape {arrays[stem].shape}; only grey (1) "
            "and RGB (3) adapt to each other"
        )
    kernel, axis = arrays[stem].astype(np.float32), shapes.STEMS[stem]
    if channels == 1:
        kernel = kernel.sum(axis, keepdims=True)
        how = "RGB images, and these are grey: the first convolution's kernels are"
        how += " summed over their channels"
    else:
        kernel = np.repeat(kernel, 3, axis) / np.float32(3)
        how = "grey images, and these are RGB: each channel gets a third of the first"
        how += " convolution's kernels"
    notify(f"{source} is for {how}")
    return arrays | {stem: kernel}


def _fitting_models(arrays: Mapping[str, Any], layout: WeightsLayout) -> list[str]:
    """Names of the models whose arrays are exactly those of a file."""
    classes = shapes.classes(arrays)
    if classes is None:
        return []
    channels = shapes.input_channels(arrays)
    fitting = []
    for name in _candidates(arrays):
        model = catalog_entry(name).net.clone(num_classes=classes)
        try:
            table = _table("", layout, model, shapes.abstract_arrays(model, channels))
        except UserError:
            continue
        if not shapes.differing(_by_key(table), arrays):
            fitting.append(name)
    return fitting


def _candidates(arrays: Mapping[str, Any]) -> Iterator[str]:
    """A few models that may fit a file; comparing every model would take long.

    Models of the catalog with the same number of parameters, and CIFAR nets of the
    same depth.
    """
    for name, entry in CATALOG.items():
        count = shapes.count_parameters_for(arrays, entry.num_classes)
        if count and entry.parameters == count:
            yield name
    first_convs = [match[1] for name in arrays if (match := _FIRST_CONV.match(name))]
    if len(set(first_convs)) == 3:
        blocks = first_convs.count("1")
        basic, bottleneck = 6 * blocks + 2, 9 * blocks + 2
        names = [f"cifar_resnet{basic}{option}" for option in ("", "_b", "_c")]
        names += [f"cifar_preact_resnet{basic}"]
        names += [f"cifar_{kind}resnet{bottleneck}" for kind in _BOTTLENECKS]
        yield from (name for name in names if name not in CATALOG)


def _table(
    source: str, layout: WeightsLayout, model: nn.Module, arrays: Mapping[str, Any]
) -> dict[str, StoredArray]:
    """How a layout stores a model's arrays, by flat name."""
    if layout == "torch":
        try:
            return torch_layout(model, arrays)
        except UserError as error:
            raise UserError(f"{source} has torch's layout: {error}") from error
    return {
        name: StoredArray.unchanged(name, tuple(array.shape))
        for name, array in arrays.items()
    }


def _classifier(layout: WeightsLayout, model: Any, head_alone: bool) -> tuple[str, ...]:
    """Prefixes of the names of a file's classifier."""
    parts = ["head"]
    if isinstance(model, VGG) and not head_alone:
        parts += ["fc1", "fc2"]  # a VGG net without classes has no dense layers
    if layout == "flax":
        return tuple(f"params/{part}/" for part in parts)
    return tuple(f"{torch_module(model, part)}." for part in parts)


def _by_key(table: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    return {stored.key: stored for stored in table.values()}


def _advice(
    layout: WeightsLayout,
    model: nn.Module,
    expected: Mapping[str, StoredArray],
    arrays: Mapping[str, np.ndarray],
    whole_file: Mapping[str, np.ndarray],
) -> str:
    head = _classifier(layout, model, head_alone=True)
    if prefixes := [prefix for prefix in seen_prefixes(arrays) if prefix]:
        return _prefix_advice(layout, expected, arrays, prefixes, head)
    if all(name.startswith(head) for name in shapes.differing(expected, arrays)):
        of_file, of_net = shapes.classes(arrays), shapes.classes(expected)
        if of_file is None:
            return (
                "it has no classifier: create the model with num_classes=None, or pass "
                "new_head=True for a fresh one"
            )
        if of_net is not None and of_net != of_file:
            return (
                f"it has {of_file} classes: create the model with num_classes="
                f"{of_file}, or pass new_head=True for a fresh classifier"
            )
    if names := _fitting_models(whole_file, layout):
        return (
            f"is it a {' or '.join(names[:3])}? create the model that the file belongs "
            "to, or give another file"
        )
    return "give a file of this model, or create the model that the file belongs to"


def _prefix_advice(
    layout: WeightsLayout,
    expected: Mapping[str, StoredArray],
    arrays: Mapping[str, np.ndarray],
    prefixes: list[str],
    head: tuple[str, ...],
) -> str:
    """For a file whose nets have unknown prefixes, or that has several nets."""
    seen = f"its names begin with {shown(prefixes)}"
    fitting: dict[str, list[str]] = {}
    for prefix in prefixes[:_MAX_NETS]:
        inner = without_prefix(arrays, prefix)
        body = {
            n: a for n, a in inner.items() if n in expected or not n.startswith(head)
        }
        fits = not shapes.differing(expected, body)
        names = [] if fits else _fitting_models(inner, layout)[:3]
        if fits or names:
            net = "this model" if fits else f"a {' or '.join(names)}"
            fitting.setdefault(net, []).append(prefix)
    if fitting:
        net = "this model" if "this model" in fitting else min(fitting)
        return (
            f"{seen}: save the arrays of {shown(fitting[net], ' or ')} alone, without "
            f"the prefix, and they fit {net}"
        )
    return f"{seen}: save the arrays of one net alone, without the prefix"


def checked_array(
    source: str, key: str, array: np.ndarray, dtype: np.dtype[Any]
) -> np.ndarray:
    """A file's array in the model's dtype; every number is finite."""
    is_float = jnp.issubdtype(dtype, jnp.floating)
    if array.dtype != dtype and not (
        is_float and jnp.issubdtype(array.dtype, jnp.floating)
    ):
        raise UserError(
            f"{source} holds {printable(key)} as {array.dtype}, but the model needs "
            f"{dtype}; convert the array"
        )
    with np.errstate(over="ignore"):
        array = array.astype(dtype, copy=False)
    if not np.isfinite(array).all():
        raise UserError(
            f"{source} holds numbers in {printable(key)} that are not finite in "
            f"{dtype}; give weights from before the training diverged"
        )
    return array
