"""Prepare annotated images: shards of ArrayRecord, and their boxes beside them."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console

from resnet_jax.config.schema import MAX_IMAGE_PIXELS
from resnet_jax.data.sources.base import Description, Example
from resnet_jax.data.sources.splits import Collection
from resnet_jax.detection.annotations import (
    AnnotationTable,
    Source,
    check_size,
    image_size,
)
from resnet_jax.detection.sources import checksum, open_source
from resnet_jax.detection.sources.prepared import UNLABELLED, dump, stored_name
from resnet_jax.errors import UserError
from resnet_jax.prepare.dataset import Annex, output_folder, prepare_collection
from resnet_jax.prepare.encoding import Encoding
from resnet_jax.storage import replacing

_SHARD_MIB = 512


def prepare_detection(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    splits: Sequence[str] = ("trainval", "test"),
    format: str | None = None,
    class_names: Sequence[str] = (),
    data_dir: str | None = None,
    num_shards: int | None = None,
    threads: int | None = None,
    on_error: str = "stop",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Writes annotated images as shards of ArrayRecord; continues an interrupted run.

    Images keep their bytes and their order. Each is decoded once, to find broken ones.

    Args:
      source: a folder in VOC or COCO layout, or ``tfds:NAME[:VERSION]``.
      output: the folder for the shards; new, or of an interrupted run.
      splits: such as "trainval", "2007/trainval" or "train2017". The first one defines
        the classes.
      format: "voc" or "coco"; None means by what the folder holds.
      class_names: the classes in their order; () takes them from the data.
      data_dir: where tfds data sets are prepared.
      num_shards: of each split; None means one for each 512 MiB.
      threads: shards to write at once; None means one per processor.
      on_error: "stop" at a broken image, or "skip" it and list it in the manifest.
      max_image_pixels: an image whose header states more pixels is broken.
      console: where to show progress.

    Returns:
      The manifest.

    Raises:
      UserError: the source or an image is broken, the folder holds something else, or
        the disk is full.
    """
    for name, value in {
        "shards": num_shards,
        "threads": threads,
        "max-image-pixels": max_image_pixels,
    }.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    parts = [part.strip() for split in splits for part in split.split("+")]
    parts = list(dict.fromkeys(parts))
    if not parts:
        raise UserError("no split is named; give such as trainval,test")
    given = os.fspath(source)
    folder = output_folder(given, output)
    opened: dict[str, Source] = {}
    for part in parts:
        if stored_name(part) in opened:
            raise UserError(
                f"the splits {', '.join(parts)} include two that would both be stored "
                f"as {stored_name(part)}: rename one"
            )
        opened[stored_name(part)] = open_source(
            given, part, format, class_names, data_dir
        )
        class_names = opened[stored_name(parts[0])].class_names
    return prepare_collection(
        _collection(given, opened),
        given,
        folder,
        splits=None,
        encoding=Encoding(max_image_pixels=max_image_pixels),
        num_shards=num_shards,
        shard_mib=_SHARD_MIB,
        threads=threads,
        on_error=on_error,
        console=console or rich.console.Console(),
        annex=_annex(opened),
    )


class _Images:
    """The images of a source, as examples without a label."""

    def __init__(self, source: Source):
        self.source, self.notes = source, source.notes
        self.class_names: Sequence[str] = source.class_names
        self.channels = 3

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        name, image = self.source.name(index), self.source.image(index)
        check_size(name, image_size(image, name), self.source.annotation(index).size)
        return Example(image, UNLABELLED, name)


def _collection(given: str, opened: Mapping[str, Source]) -> Collection:
    class_names = next(iter(opened.values())).class_names
    sources = {split: _Images(source) for split, source in opened.items()}
    description = Description(
        name=given,
        class_names=class_names,
        channels=3,
        num_examples={split: len(source) for split, source in opened.items()},
    )
    return Collection(description, sources.__getitem__)


def _annex(opened: Mapping[str, Source]) -> Annex:
    """The annotations of all splits."""
    category_ids = next(iter(opened.values())).category_ids
    sums = {split: checksum(source) for split, source in opened.items()}

    def write(folder: Path, splits: Mapping[str, Any]) -> dict[str, Any]:
        files = {}
        for split, entry in splits.items():
            left_out = {item["index"] for item in entry["left_out"]}
            kept = [i for i in range(len(opened[split])) if i not in left_out]
            content = _dump(opened[split], kept)
            name = f"{split}.annotations.npz"
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
            files[split] = {
                "file": name,
                "examples": len(kept),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        ids = None if category_ids is None else list(category_ids)
        return {"annotations": {"category_ids": ids, "files": files}}

    return Annex({"annotations_sha256": sums}, write)


def _dump(source: Source, kept: Sequence[int]) -> bytes:
    """The annotations of the images ``kept``."""
    found = [source.annotation(index) for index in kept]

    def joined(name: str, empty: np.ndarray) -> np.ndarray:
        return np.concatenate([empty, *(getattr(each, name) for each in found)])

    nothing = np.zeros(0, bool)
    table = AnnotationTable.build(
        [each.size for each in found],
        [len(each.boxes) for each in found],
        joined("boxes", np.zeros((0, 4), np.float32)),
        joined("classes", np.zeros(0, np.int32)),
        joined("difficult", nothing),
        joined("crowd", nothing),
        joined("areas", np.zeros(0, np.float32)),
    )
    ids = source.image_ids
    return dump(
        [source.name(index) for index in kept],
        table,
        None if ids is None else ids[np.asarray(kept, np.int64)],
    )
