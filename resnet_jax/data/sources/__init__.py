"""Sources: random access to labelled images as they are stored.

A source returns example i; a collection opens the sources of a data set and describes
it. ``data.path`` names files on disk: a prepared data set, class folders, CIFAR's
binary files or MNIST's idx files. ``data.name`` names a tfds data set, which is read
from ArrayRecord without TensorFlow. ``docs/data.md`` describes the layouts.
"""

import os

from etils import epath

from resnet_jax.config.schema import DataConfig
from resnet_jax.data.sources.arrays import open_cifar, open_idx
from resnet_jax.data.sources.base import (
    Description,
    Example,
    Relabelled,
    Source,
    Subset,
)
from resnet_jax.data.sources.folders import open_folders
from resnet_jax.data.sources.imagenet import readable_names
from resnet_jax.data.sources.records import open_records, read_manifest
from resnet_jax.data.sources.splits import Collection, refuse_overlap, split_names
from resnet_jax.errors import UserError
from resnet_jax.storage import locate, reached

__all__ = [
    "Collection",
    "Description",
    "Example",
    "Relabelled",
    "Source",
    "Subset",
    "open_collection",
    "open_path",
    "open_sources",
    "readable_names",
]


def open_collection(data: DataConfig) -> Collection:
    """The data set that a config names.

    Raises:
      UserError: the data are missing; says what to do.
    """
    if data.path is None:
        # tfds is slow to import, and reading other files does not need it.
        from resnet_jax.data.sources.tfds import open_tfds

        return open_tfds(data.name, data.data_dir)
    return open_path(data.path, classes_of=split_names(data.train_split)[0])


def open_path(path: str | os.PathLike[str], classes_of: str = "train") -> Collection:
    """The data set in a folder.

    Args:
      path: a folder, or a gs:// URL of a prepared data set.
      classes_of: the split whose class folders define the classes.

    Raises:
      UserError: there is no data set, or it is damaged.
    """
    root = epath.Path(locate(path))
    with reached(f"data.path {root}"):
        exists = root.exists()
    if not exists:
        raise UserError(
            f"data.path {root} does not exist; give a folder made by resnet-jax "
            "prepare, or one with train/CLASS/IMAGE, CIFAR's .bin or MNIST's idx files"
        )
    if not root.is_dir():
        raise UserError(
            f"data.path {root} is a file; unpack it and give the folder, or convert it "
            "with resnet-jax prepare"
        )
    manifest = read_manifest(root)
    if manifest is not None:
        return open_records(root, manifest)
    if "://" in os.fspath(root):
        raise UserError(
            f"data.path {root} has no manifest.json: resnet-jax prepare did not make "
            "it; copy other files to a disk, or mount the bucket (gcsfuse), and give "
            "that folder"
        )
    if (root / "progress.json").exists():
        raise UserError(
            f"data.path {root} is only partly prepared; run the same resnet-jax "
            "prepare command again"
        )
    return open_cifar(root) or open_idx(root) or open_folders(root, classes_of)


def open_sources(
    data: DataConfig, collection: Collection
) -> tuple[Source, Source, Source | None]:
    """The training source, the test source and, if configured, the held-out source.

    Raises:
      UserError: a split is missing, or two of the splits share examples.
    """
    uses = {"data.train_split": data.train_split, "data.test_split": data.test_split}
    if data.holdout_split is not None:
        uses["data.holdout_split"] = data.holdout_split
    refuse_overlap(collection.description, uses)
    train, test, *holdout = (collection.source(split) for split in uses.values())
    return train, test, holdout[0] if holdout else None
