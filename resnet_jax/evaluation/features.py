"""The features of images: the inputs of a trained net's classifier."""

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import rich.console

from resnet_jax.console import make_console, say
from resnet_jax.data.sources.base import notes
from resnet_jax.errors import UserError
from resnet_jax.evaluation import outputs
from resnet_jax.evaluation.inputs import Inputs, open_inputs
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.evaluation.outputs import BATCH_SIZE, Member
from resnet_jax.storage import expand, refuse_existing, writing
from resnet_jax.weights.files import read_arrays, write_safetensors

SUFFIXES = (".safetensors", ".npz")


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of images.

    Attributes:
      features: float32 (n, c).
      labels: int32 (n,); -1 for images without a class.
      names: of the n files, relative to the data's folder; or of records.
      class_names: in the order of the labels; empty if there are none.
    """

    features: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    class_names: tuple[str, ...]


def extract_features(
    net: TrainedNet,
    data: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    overrides: Mapping[str, str] | None = None,
    batch_size: int = BATCH_SIZE,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    console: rich.console.Console | None = None,
) -> Features:
    """Applies a net without its classifier to images, in the net's own single view.

    The features are the means over the last map: those that ``create_model(...,
    num_classes=None)`` returns. Holds all features and a few batches of images in
    memory.

    Args:
      net: from ``load_net``.
      data: a folder of images; or what ``evaluate`` takes: a folder of class folders, a
        data set's folder, or the name of a tfds data set. None means the data of the
        run that trained the net.
      split: of the data set, "test" or "val" by default, or a part: "train[:10%]".
      overrides: values as text for fields of the data, such as
        ``{"data.on_error": "skip"}``, which names broken images and leaves them out.
        For the data of a run, give them to ``load_net``.
      batch_size: images per batch; does not affect results.
      out: also write them to this file, see ``save_features``.
      force: replace ``out`` if it exists.
      console: where to print; standard output by default.

    Raises:
      UserError: there are no such images, an image is broken, or ``out`` cannot be
        written.
    """
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, not {batch_size}")
    target = None if out is None else _target(out, force)
    console = console or make_console()
    inputs = open_inputs(net, data, split, overrides, unlabelled=True)
    for note in notes(inputs.source):
        say(console, note)

    def skip(fault: str) -> None:
        say(console, f"warning: skipped: {fault}")

    on_fault = skip if inputs.data.on_error == "skip" else None
    found = _collected(net, inputs, batch_size, on_fault)
    if data is not None:
        folder = f"{inputs.data.path}{os.sep}"
        names = tuple(name.removeprefix(folder) for name in found.names)
        found = dataclasses.replace(found, names=names)
    if target is not None:
        save_features(target, found)
        n, c = found.features.shape
        say(console, f"wrote {target}: {c} features of each of {n:,} images")
    return found


def _collected(
    net: TrainedNet,
    inputs: Inputs,
    batch_size: int,
    on_fault: Callable[[str], object] | None,
) -> Features:
    """The features of all images, in their order."""
    found = list(
        outputs.apply(
            [Member(net, net.protocol, features=True)],
            inputs.source,
            data=inputs.data,
            batch_size=batch_size,
            on_fault=on_fault,
        )
    )
    if not found:
        raise UserError("no image can be decoded")
    return Features(
        features=np.concatenate([output.log_probs for output in found]),
        labels=np.array([output.label for output in found], np.int32),
        names=tuple(output.name for output in found),
        class_names=inputs.class_names,
    )


def save_features(path: str | os.PathLike[str], features: Features) -> None:
    """Writes features to a file, complete or not at all.

    A ``.safetensors`` file holds the arrays ``features`` and ``labels``, and the two
    lists of names as JSON in its metadata. A ``.npz`` file holds four arrays.

    Raises:
      UserError: the path has another suffix, or cannot be written.
    """
    target = _target(path, force=True)
    arrays = {"features": features.features, "labels": features.labels}
    lists = {"names": features.names, "class_names": features.class_names}
    if target.suffix == ".safetensors":
        metadata = {key: json.dumps(lists[key]) for key in lists}
        write_safetensors(target, arrays, metadata)
        return
    texts = {key: np.array(lists[key], np.str_) for key in lists}
    with writing(target) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays, **texts)


def load_features(path: str | os.PathLike[str]) -> Features:
    """Reads the features of ``save_features``.

    Raises:
      UserError: the file is missing, damaged, or holds something else.
    """
    file = expand(path)
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as content:
                arrays = dict(content)
            lists = {key: arrays[key].tolist() for key in ("names", "class_names")}
        else:
            arrays, metadata = read_arrays(file)
            lists = {key: json.loads(metadata[key]) for key in ("names", "class_names")}
        return Features(
            arrays["features"],
            arrays["labels"],
            tuple(lists["names"]),
            tuple(lists["class_names"]),
        )
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{file} holds no features that resnet-jax features wrote ({error})"
        ) from error


def _target(path: str | os.PathLike[str], force: bool) -> Path:
    """The file to write, checked before any work."""
    target = expand(path)
    if target.suffix not in SUFFIXES:
        raise UserError(
            f"{target} cannot be written: give a path that ends in "
            f"{' or '.join(SUFFIXES)}"
        )
    refuse_existing(target, force)
    return target
