"""Weights of a net from a file and into one, in Flax's layout or torch's.

The flax layout names the arrays as the net does, "params/stem/conv/kernel"; the torch
layout is that of torchvision and timm (``torch_layout``). Neither depends on whether
the net's blocks run as a loop.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from resnet_jax.errors import UserError
from resnet_jax.models.catalog import CATALOG, catalog_entry
from resnet_jax.models.vgg import VGG
from resnet_jax.weights import shapes
from resnet_jax.weights.files import read_arrays, write_safetensors
from resnet_jax.weights.hub import locate
from resnet_jax.weights.torch_layout import (
    COUNTER,
    StoredArray,
    counters,
    torch_layout,
    torch_module,
)

Layout = Literal["flax", "torch"]
LAYOUTS: tuple[Layout, ...] = ("flax", "torch")

SUFFIX = ".safetensors"
FORMAT = "resnet_jax"
"""The value of "format" in the metadata of files in the flax layout."""
FORMAT_VERSION = "1"

# Of a block, in either layout; its stage is the group.
_FIRST_CONV = re.compile(r"(?:params/stage|layer)(\d+)(?:/block|\.)\d+[./]conv1\b")

# What other programs write into the files that they load with torch.
_TORCH_FORMAT = "pt"


def load_weights(
    path_or_name: str | os.PathLike[str],
    model: nn.Module,
    *,
    new_head: bool = False,
    rng: jax.Array | None = None,
    example: Any = None,
) -> dict[str, Any]:
    """The variables of a net, read from a file of either layout.

    Every array of the net must be in the file, in its shape, and nothing else may be:
    but for torch's counters ``num_batches_tracked``, which are ignored, and the
    classifier, where ``new_head`` or a model without one leaves it out. The images'
    channels are those of the file's first kernel.

    Running variances are taken as they are: torch averages the unbiased variance of
    the batches, and so does our BatchNorm.

    Args:
      path_or_name: of a file of safetensors or torch.save, or a name that ``locate``
        knows, as "hf-hub:timm/resnet18.a1_in1k" or "torchvision:resnet50".
      model: whose variables they are: a net of this library, or in the flax layout any
        module.
      new_head: leave the file's classifier where it is and draw a fresh one, to
        fine-tune on other classes.
      rng: key of the fresh classifier, which is what ``model.init(rng, ...)`` gives;
        by default ``jax.random.key(0)``.
      example: for a module that is not of this library, an input of it or its
        ``jax.ShapeDtypeStruct``.

    Returns:
      The tree of ``model.init``: float32 arrays for every dtype of the file, which is
      exact from float16 and bfloat16, and bit for bit from float32.

    Raises:
      UserError: there is no such file, it is damaged or asks for more than arrays, its
        arrays are not those of the net, or one of them is not finite.
    """
    arrays, metadata = read_arrays(locate(path_or_name))
    return variables_of(
        os.fspath(path_or_name),
        arrays,
        file_layout(os.fspath(path_or_name), arrays, metadata),
        model,
        new_head=new_head,
        rng=rng,
        example=example,
    )


def save_weights(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    model: nn.Module,
    *,
    layout: Layout = "flax",
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Writes the variables of a net as a safetensors file, whole or not at all.

    The torch layout is what ``load_state_dict(strict=True)`` of torchvision's or
    timm's net takes from ``safetensors.torch.load_file``; the counters
    ``num_batches_tracked`` are 0 in it. Both layouts come back bit for bit.

    Args:
      path: of the file, which ends in .safetensors; replaced if it is there.
      variables: of ``model``, on any devices.
      model: a net of this library, or in the flax layout any module; the variables of
        another module are written as they are.
      layout: "flax" or "torch".
      name: of the model in the catalog, to be kept in the file, so that
        ``resnet-jax convert`` knows it.
      options: of ``create_model`` to be kept beside the name, of values that JSON has.

    Returns:
      The arrays as they were written, by their names.

    Raises:
      UserError: the file cannot be written, the variables are not those of the model
        or not finite, or torchvision and timm have no such net.
    """
    path = os.fspath(path)
    if layout not in LAYOUTS:
        raise UserError(
            f"unknown layout {layout!r} of weights; valid are {', '.join(LAYOUTS)}"
        )
    if not path.endswith(SUFFIX):
        raise UserError(
            f"{path} cannot be written: weights are written as safetensors; give a "
            f"path that ends in {SUFFIX}"
        )
    host = shapes.flatten(jax.device_get(variables), model)
    arrays = {key: np.asarray(leaf) for key, leaf in host.items()}
    refused = f"the variables are not written to {path}"
    if shapes.is_image_net(model):
        expected = shapes.abstract_arrays(model, shapes.input_channels(arrays))
        difference = shapes.differences(expected, arrays)
        if difference:
            raise UserError(
                f"{refused}: they are not those of this {type(model).__name__}, "
                f"{difference}; give all variables of the model, and nothing else"
            )
        arrays = {key: arrays[key] for key in expected}
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(
                f"{refused}: {key} is not finite; give the variables of an earlier step"
            )
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION}
    if layout == "torch":
        table = torch_layout(model, arrays)
        arrays = {table[key].key: table[key].to_file(arrays[key]) for key in table}
        arrays |= counters(table)
        metadata = {"format": _TORCH_FORMAT}
    if name is not None:
        metadata["model"] = name
        metadata["model_options"] = json.dumps(dict(options or {}))
    write_safetensors(path, arrays, metadata)
    return arrays


def file_layout(
    source: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> Layout:
    """In which layout a file is, by its metadata and names.

    Raises:
      UserError: it holds nothing, or is of a later version of our format.
    """
    if not arrays:
        raise UserError(f"{source} holds no arrays; give a file of a net's weights")
    if metadata.get("format") == FORMAT:
        version = metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{source} is of version {version} of the format {FORMAT}, and version "
                f"{FORMAT_VERSION} is read; load it with the resnet_jax that wrote it"
            )
        return "flax"
    return "flax" if all("/" in name for name in arrays) else "torch"


def variables_of(
    source: str,
    arrays: Mapping[str, np.ndarray],
    layout: Layout,
    model: nn.Module,
    *,
    new_head: bool = False,
    rng: jax.Array | None = None,
    example: Any = None,
) -> dict[str, Any]:
    """``load_weights`` from arrays that have been read; ``source`` names their file."""
    arrays = without_counters(arrays, layout)
    channels = shapes.input_channels(arrays)
    expected = shapes.abstract_arrays(model, channels, example)
    table = _table(source, layout, model, expected)
    kept = arrays
    if new_head:
        is_head = [name for name in table if name.startswith("params/head/")]
        if not is_head:
            raise UserError(
                f"new_head: this {type(model).__name__} has no classifier; leave "
                "new_head out"
            )
        table = {name: table[name] for name in table if name not in is_head}
    if new_head or getattr(model, "num_classes", 0) is None:
        left_out = _classifier(layout, model, new_head)
        kept = {key: arrays[key] for key in arrays if not key.startswith(left_out)}
    _refuse_difference(source, layout, model, table, kept, arrays)
    loaded: dict[str, Any] = {}
    for name, stored in table.items():
        dtype = expected[name].dtype
        array = _checked(source, stored.key, kept[stored.key], dtype)
        loaded[name] = stored.from_file(array)
    if new_head:
        key = jax.random.key(0) if rng is None else rng
        loaded |= shapes.fresh_head(model, key, channels, example)
    whole = {name: jnp.asarray(loaded[name]) for name in expected}
    return shapes.unflatten(whole, model)


def without_counters(
    arrays: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, np.ndarray]:
    """A file's arrays but for torch's counters of batches."""
    if layout == "flax":
        return dict(arrays)
    return {key: a for key, a in arrays.items() if key.split(".")[-1] != COUNTER}


def fitting_models(arrays: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """The names of nets that have a file's arrays, all of them and no others.

    Args:
      arrays: of a file with a classifier, without the counters; anything with a shape.
      layout: of the file.
    """
    classes = shapes.classes(arrays)
    if classes is None:
        return
    channels = shapes.input_channels(arrays)
    for name in _candidates(arrays):
        model = catalog_entry(name).net.clone(num_classes=classes)
        try:
            table = _table("", layout, model, shapes.abstract_arrays(model, channels))
        except UserError:
            continue
        if not shapes.differing(_by_key(table), arrays):
            yield name


def _candidates(arrays: Mapping[str, Any]) -> Iterator[str]:
    """The few names of nets that a file may be of: what arrays they have, takes time.

    Those of the catalog with as many parameters, and the CIFAR nets of the depth.
    """
    for name, entry in CATALOG.items():
        count = shapes.count_parameters_for(arrays, entry.num_classes)
        if count and entry.parameters == count:
            yield name
    first_convs = [match[1] for name in arrays if (match := _FIRST_CONV.match(name))]
    if len(set(first_convs)) == 3:
        blocks = first_convs.count("1")
        basic, bottleneck = 6 * blocks + 2, 9 * blocks + 2
        for name in (
            f"cifar_resnet{basic}",
            f"cifar_resnet{basic}_b",
            f"cifar_resnet{basic}_c",
            f"cifar_preact_resnet{basic}",
            f"cifar_bottleneck_resnet{bottleneck}",
            f"cifar_preact_bottleneck_resnet{bottleneck}",
        ):
            if name not in CATALOG:
                yield name


def _table(
    source: str, layout: Layout, model: nn.Module, arrays: Mapping[str, Any]
) -> dict[str, StoredArray]:
    """How a layout stores a net's arrays, by their flat names."""
    if layout == "torch":
        try:
            return torch_layout(model, arrays)
        except UserError as error:
            raise UserError(f"{source} is in torch's layout: {error}") from error
    return {name: _as_it_is(name, tuple(array.shape)) for name, array in arrays.items()}


def _as_it_is(name: str, shape: tuple[int, ...]) -> StoredArray:
    return StoredArray(name, shape, shape, shape, tuple(range(len(shape))))


def _classifier(layout: Layout, model: Any, head_alone: bool) -> tuple[str, ...]:
    """How the names of a file's classifier begin.

    A VGG net without classes has none of its dense layers.
    """
    parts = ["head"]
    if isinstance(model, VGG) and not head_alone:
        parts += ["fc1", "fc2"]
    if layout == "flax":
        return tuple(f"params/{part}/" for part in parts)
    return tuple(f"{torch_module(model, part)}." for part in parts)


def _by_key(table: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    return {stored.key: stored for stored in table.values()}


def _refuse_difference(
    source: str,
    layout: Layout,
    model: nn.Module,
    table: Mapping[str, StoredArray],
    arrays: Mapping[str, np.ndarray],
    whole_file: Mapping[str, np.ndarray],
) -> None:
    """Raises UserError where the file has not the net's arrays, and says what it is."""
    expected = _by_key(table)
    difference = shapes.differences(expected, arrays)
    if not difference:
        return
    raise UserError(
        f"{source} does not fit the {type(model).__name__}: {difference}; "
        + _advice(layout, model, expected, arrays, whole_file)
    )


def _advice(
    layout: Layout,
    model: nn.Module,
    expected: Mapping[str, StoredArray],
    arrays: Mapping[str, np.ndarray],
    whole_file: Mapping[str, np.ndarray],
) -> str:
    head = _classifier(layout, model, head_alone=True)
    if all(name.startswith(head) for name in shapes.differing(expected, arrays)):
        of_file, of_net = shapes.classes(arrays), shapes.classes(expected)
        if of_file is None:
            return (
                "it has no classifier: create the model with num_classes=None, or give "
                "new_head=True for a fresh one"
            )
        if of_net is not None and of_net != of_file:
            return (
                f"it is of {of_file} classes: create the model with num_classes="
                f"{of_file}, or give new_head=True for a fresh classifier"
            )
    names = list(fitting_models(whole_file, layout))
    if names:
        return (
            f"is it a {' or '.join(names[:3])}? create the model that the file is of, "
            "or give another file"
        )
    return "give a file of this net, or create the model that the file is of"


def _checked(
    source: str, key: str, array: np.ndarray, dtype: np.dtype[Any]
) -> np.ndarray:
    """An array of a file in the net's dtype, all of it finite."""
    is_float = jnp.issubdtype(dtype, jnp.floating)
    if array.dtype != dtype and not (
        is_float and jnp.issubdtype(array.dtype, jnp.floating)
    ):
        raise UserError(
            f"{source} holds {shapes.shown(key)} as {array.dtype}, and the net has it "
            f"as {dtype}; convert the file's arrays to {dtype}"
        )
    with np.errstate(over="ignore"):
        array = array.astype(dtype, copy=False)
    if not np.isfinite(array).all():
        raise UserError(
            f"{source} holds numbers in {shapes.shown(key)} that are not finite in "
            f"{dtype}; give weights of before the training diverged, or a whole file"
        )
    return array
