"""Sources: random access to labelled images as they are stored.

A source gives example i; a collection holds the sources of a data set and says what it
is. Files at hand (what ``resnet-jax prepare`` wrote, a folder of class folders, CIFAR's
binary files, MNIST's idx files) are found by their path; all else is a tfds data set by
its name, read from ArrayRecord without TensorFlow. ``docs/data.md`` has the layouts.
"""

import os

from etils import epath

from resnet_jax.config.schema import DataConfig
from resnet_jax.data.sources.arrays import open_cifar, open_idx
from resnet_jax.data.sources.base import (
    Collection,
    Description,
    Example,
    Source,
    Subset,
)
from resnet_jax.data.sources.folders import FolderCollection
from resnet_jax.data.sources.imagenet import readable_names
from resnet_jax.data.sources.splits import refuse_overlap, split_names
from resnet_jax.errors import UserError
from resnet_jax.storage import reached

__all__ = [
    "Collection",
    "Description",
    "Example",
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
      UserError: the data are not there, in one sentence that says what to do.
    """
    if data.path is None:
        # tfds is heavy: not for those who read files of their own.
        from resnet_jax.data.sources.tfds import TfdsCollection

        return TfdsCollection(data.name, data.data_dir)
    return open_path(data.path, classes_of=split_names(data.train_split)[0])


def open_path(path: str | os.PathLike[str], classes_of: str = "train") -> Collection:
    """The data set in a folder.

    Args:
      path: a folder, or a gs:// URL of a prepared data set.
      classes_of: the split whose class folders are the classes.

    Raises:
      UserError: there is none, or it is damaged.
    """
    # Here, for records.py needs Example.
    from resnet_jax.data.records import read_manifest
    from resnet_jax.data.sources.records import RecordsCollection

    root = epath.Path(os.path.expanduser(path))
    with reached(f"data.path {root}"):
        exists = root.exists()
    if not exists:
        raise UserError(
            f"data.path {root} does not exist; give the folder that resnet-jax prepare "
            "made, or that holds train/CLASS/IMAGE, CIFAR's .bin or MNIST's idx files"
        )
    if not root.is_dir():
        raise UserError(
            f"data.path {root} is a file; unpack it and give the folder, or convert it "
            "with resnet-jax prepare"
        )
    manifest = read_manifest(root)
    if manifest is not None:
        return RecordsCollection(root, manifest)
    if "://" in os.fspath(root):
        raise UserError(
            f"data.path {root} has no manifest.json; only what resnet-jax prepare made "
            "can be read from there. Copy other files to a disk, or mount the bucket "
            "(gcsfuse), and give that folder"
        )
    if (root / "progress.json").exists():
        raise UserError(
            f"data.path {root} is not prepared to the end; give the same resnet-jax "
            "prepare command again"
        )
    for reader in (open_cifar, open_idx):
        found = reader(root)
        if found is not None:
            return found
    return FolderCollection(root, classes_of)


def open_sources(
    data: DataConfig, collection: Collection | None = None
) -> tuple[Source, Source, Source | None]:
    """The sources to train on, to test on and to choose by, where there is a split.

    ``collection`` stands in for the data set that the config names.

    Raises:
      UserError: data are missing, or two of the splits share examples.
    """
    collection = collection or open_collection(data)
    uses = {"data.train_split": data.train_split, "data.test_split": data.test_split}
    if data.holdout_split is not None:
        uses["data.holdout_split"] = data.holdout_split
    refuse_overlap(collection.description, uses)
    train, test, *holdout = (collection.source(split) for split in uses.values())
    return train, test, holdout[0] if holdout else None
