"""The images that nets are tested on: a run's own split, or other data."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from resnet_jax.config import override, resolve
from resnet_jax.config.schema import DataConfig
from resnet_jax.data.sources import (
    Collection,
    Description,
    Source,
    open_collection,
)
from resnet_jax.data.sources.folders import (
    FolderSource,
    Names,
    is_image_name,
    is_leftover,
    open_folders,
    subfolders,
)
from resnet_jax.errors import UserError
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.identity import Identity
from resnet_jax.storage import expand, is_remote

UNKNOWN = -1
"""The label of an image that has none."""

_TEST_SPLITS = ("test", "val", "validation")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Images with labels.

    Attributes:
      source: the images.
      class_names: in the order of the labels.
      split: its name.
      identity: what distinguishes the data from others.
      data: how they are read.
    """

    source: Source
    class_names: tuple[str, ...]
    split: str
    identity: Identity
    data: DataConfig


def open_inputs(
    net: TrainedNet,
    data: str | os.PathLike[str] | None = None,
    split: str | None = None,
    overrides: Mapping[str, str] | None = None,
    *,
    unlabelled: bool = False,
) -> Inputs:
    """Opens the images to test a net on.

    Args:
      net: whose run's data are the default.
      data: other data: a folder (see docs/data.md), one of class folders without
        splits, or the name of a tfds data set.
      split: "test" (the default), "holdout" or "train" of the run; or a split of other
        data, by default test or val.
      overrides: values as text for fields of the config's data section.
      unlabelled: also take a folder of images without classes; their labels are -1.

    Raises:
      UserError: there are no such data.
    """
    if net.run is not None and data is None:
        chosen = net.run.split(split or "test")
        opened = net.run.dataset
        names = tuple(opened.class_names)
        config = net.run.config.data
        return Inputs(chosen.source, names, chosen.name, opened.identity, config)
    if data is None and not overrides:
        raise UserError(
            f"{net.source} brings no data: give them with --data FOLDER, or the name "
            "of a tfds data set"
        )
    config = _data_config(net, data, overrides or {})
    single = _single_split(config, unlabelled)
    if single is None or split not in (None, single[1]):
        collection = open_collection(config)
        split = split or _test_split(collection, overrides or {})
        source = collection.source(split)
    else:
        collection, split = single
        source = collection.open_split(split)
    about, names = collection.description, tuple(source.class_names)
    version = about.checksum or about.version
    identity = Identity(about.kind, version, names, {split: len(source)})
    return Inputs(source, names, split, identity, config)


def _data_config(
    net: TrainedNet,
    data: str | os.PathLike[str] | None,
    overrides: Mapping[str, str],
) -> DataConfig:
    """How to read other data: as the net's run did, or by default."""
    values = dict(overrides)
    if data is not None:
        text = os.fspath(data)
        if is_remote(text) or "/" in text or expand(text).exists():
            values["data.path"] = text
            values.setdefault("data.name", Path(text).name or "data")
        else:
            values["data.name"] = text
    for name in values:
        if not name.startswith("data."):
            raise UserError(f"{name} cannot be changed for a trained net")
    base = net.run.config if net.run else resolve({"training": {"steps": 1}})
    return override(base, values).data


def _single_split(
    config: DataConfig, unlabelled: bool
) -> tuple[Collection, str] | None:
    """A folder CLASS/IMAGE as the only split of the folder above it, if it is one.

    So is a folder of images alone if ``unlabelled``.
    """
    if config.path is None or is_remote(config.path) or not os.path.isdir(config.path):
        return None
    folder = Path(config.path)
    classes = subfolders(folder)
    # A split's images may be in one folder, beside a list of their labels.
    are_splits = {"train", *_TEST_SPLITS}.issuperset(classes)
    if not are_splits and _images_in(folder / classes[0]):
        return open_folders(folder.parent, classes_of=folder.name), folder.name
    if not unlabelled or classes or not (names := _images_in(folder)):
        return None
    labels = np.full(len(names), UNKNOWN, np.int32)
    source = FolderSource(config.path, Names(names), labels, ())
    counts = {folder.name: len(names)}
    about = Description(config.path, (), source.channels, counts, kind="images")
    return Collection(about, lambda split: source), folder.name


def _images_in(folder: Path) -> list[str]:
    """Names of the images in a folder itself, sorted."""
    with os.scandir(folder) as entries:
        files = (entry.name for entry in entries if entry.is_file())
        return sorted(n for n in files if is_image_name(n) and not is_leftover(n))


def _test_split(collection: Collection, overrides: Mapping[str, str]) -> str:
    if "data.test_split" in overrides:
        return overrides["data.test_split"]
    splits = collection.description.splits
    for name in _TEST_SPLITS:
        if name in splits:
            return name
    if len(splits) == 1:
        return splits[0]
    raise UserError(
        f"{collection.description.name} has the splits {', '.join(splits)}: say which "
        "with --split"
    )
