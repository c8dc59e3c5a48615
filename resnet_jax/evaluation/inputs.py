"""The images that nets are tested on: a run's own split, or other data."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resnet_jax.config import Config, override, resolve
from resnet_jax.config.schema import DataConfig
from resnet_jax.data.sources import Collection, Source, open_collection
from resnet_jax.data.sources.folders import is_image_name, open_folders, subfolders
from resnet_jax.errors import UserError
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.identity import Identity
from resnet_jax.storage import expand, is_remote

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
    data: str | None = None,
    split: str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Inputs:
    """Opens the images to test a net on.

    Args:
      net: whose run's data are the default.
      data: other data: a folder (see docs/data.md), one of class folders without
        splits, or the name of a tfds data set.
      split: "test" (the default), "holdout" or "train" of the run; or a split of other
        data, by default test or val.
      overrides: values as text for fields of the config's data section.

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
    return _other_data(net, data, split, overrides or {})


def _other_data(
    net: TrainedNet,
    data: str | None,
    split: str | None,
    overrides: Mapping[str, str],
) -> Inputs:
    values = dict(overrides)
    if data is not None:
        is_folder = is_remote(data) or "/" in data or expand(data).exists()
        values["data.path" if is_folder else "data.name"] = data
        if is_folder:
            values.setdefault("data.name", Path(data).name or "data")
    base = net.run.config if net.run else resolve({"training": {"steps": 1}})
    config = _quiet_override(base, values).data
    collection, only = _flat(config)
    if collection is None or split not in (None, only):
        collection = open_collection(config)
    split = split or only or _test_split(collection, values)
    source = collection.source(split)
    description = collection.description
    names = tuple(source.class_names)
    version = description.checksum or description.version
    identity = Identity(description.kind, version, names, {split: len(source)})
    return Inputs(source, names, split, identity, config)


def _quiet_override(base: Config, values: Mapping[str, str]) -> Config:
    """A config with the fields of the data section replaced."""
    for name in values:
        if not name.startswith("data."):
            raise UserError(f"{name} cannot be changed for a trained net")
    return override(base, values)


def _flat(config: DataConfig) -> tuple[Collection | None, str | None]:
    """A folder CLASS/IMAGE as the only split of the folder above, if it is one."""
    if config.path is None or is_remote(config.path):
        return None, None
    folder = Path(config.path)
    classes = subfolders(folder) if folder.is_dir() else []
    # ImageNet's validation images lie in one folder, beside a list of their labels.
    only_splits = {"train", *_TEST_SPLITS}.issuperset(classes)
    if only_splits or not _holds_images(folder / classes[0]):
        return None, None
    return open_folders(folder.parent, classes_of=folder.name), folder.name


def _holds_images(folder: Path) -> bool:
    return any(
        is_image_name(entry.name) and entry.is_file() for entry in folder.iterdir()
    )


def _test_split(collection: Collection, values: Mapping[str, str]) -> str:
    if "data.test_split" in values:
        return values["data.test_split"]
    splits: Sequence[str] = collection.description.splits
    found: Any = [name for name in _TEST_SPLITS if name in splits] or splits
    if len(found) > 1 and found is splits:
        raise UserError(
            f"{collection.description.name} has the splits {', '.join(splits)}: say "
            "which with --split"
        )
    return found[0]
