"""Prepared data sets: shards of ArrayRecord and a manifest.

A record is, with little-endian integers,

    int32 label | uint32 length of the name | name in UTF-8 | the image

where the image is the bytes of an encoded file, as found or as ``resnet-jax prepare``
encoded it again. Shards have ``group_size:1``, so that each record can be read alone,
and no compression, because images are compressed. ``docs/data.md`` shows a reader.
"""

import bisect
import dataclasses
import hashlib
import itertools
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from resnet_jax.data.sources.base import (
    Description,
    Example,
    check_label,
    refuse_special,
)
from resnet_jax.data.sources.manifest import FORMAT, MANIFEST, VERSION, read_manifest
from resnet_jax.data.sources.splits import Collection
from resnet_jax.errors import UserError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "VERSION",
    "WRITER_OPTIONS",
    "RecordsSource",
    "open_records",
    "pack",
    "read_manifest",
    "shard_name",
    "unpack",
]

WRITER_OPTIONS = "group_size:1,uncompressed"

_HEADER = struct.Struct("<iI")


def pack(label: int, name: str, image: bytes) -> bytes:
    """A record."""
    encoded = name.encode("utf-8", "surrogateescape")
    return b"".join((_HEADER.pack(label, len(encoded)), encoded, image))


def unpack(record: bytes) -> Example:
    """The example of a record.

    Raises:
      UserError: the bytes are not a record.
    """
    try:
        label, length = _HEADER.unpack_from(record)
        end = _HEADER.size + length
        name = record[_HEADER.size : end].decode("utf-8", "surrogateescape")
    except (struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{len(record)} bytes are not one of our records") from error
    return Example(record[end:], label, name)


def shard_name(split: str, index: int, count: int) -> str:
    """File name of shard ``index`` of ``count``."""
    return f"{split}-{index:05d}-of-{count:05d}.array_record"


@dataclasses.dataclass(frozen=True)
class _Shard:
    """Tells array_record how many records a file holds, so that it need not count."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


class RecordsSource:
    """A split of a prepared data set; files are opened when first read."""

    def __init__(
        self,
        files: Sequence[str],
        counts: Sequence[int],
        class_names: Sequence[str],
        channels: int,
        labelled: bool = True,
    ):
        """``files[i]`` holds ``counts[i]`` records, perhaps without a class's label."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.class_names, self.channels = class_names, channels
        self._files, self._labelled = list(files), labelled
        self._ends = list(itertools.accumulate(counts))
        self._records = ArrayRecordDataSource(
            [_Shard(*each) for each in zip(files, counts, counts, strict=True)]
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        try:
            example = unpack(self._records[index])
            if self._labelled:
                check_label(example.label, len(self.class_names), example.name)
            return example
        except (UserError, ValueError, RuntimeError, OSError, IndexError) as error:
            if not 0 <= index < len(self):
                raise IndexError(f"example {index} of {len(self)}") from error
            file = self._files[bisect.bisect_right(self._ends, index)]
            why = f": {error}" if isinstance(error, UserError) else ""
            raise UserError(
                f"shard {file} is missing or damaged at example {index}{why}; run "
                f"resnet-jax prepare --verify {os.path.dirname(file)}"
            ) from error


def _checksum(splits: Mapping[str, Any]) -> str:
    """A checksum of all shards that a manifest lists."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        for shard in splits[name]["shards"]:
            digest.update(f"{name} {shard['file']} {shard['sha256']}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def open_records(
    folder: epath.Path, manifest: Mapping[str, Any], labelled: bool = True
) -> Collection:
    """A prepared data set, in a folder or below a gs:// URL; opens no shard.

    Args:
      folder: of the shards.
      manifest: of the folder.
      labelled: whether to expect a label for each image; a data set for detection has
        boxes instead.

    Raises:
      UserError: the images have boxes where labels are expected, or labels where boxes
        are; or, on opening a split, a shard is a device or a pipe.
    """
    if labelled and "annotations" in manifest:
        raise UserError(
            f"{folder} was prepared for detection: its images have boxes, not labels; "
            "give data with a class for each image"
        )
    splits, shape = manifest["splits"], manifest.get("image_shape")
    described = Description(
        name=str(folder),
        class_names=tuple(manifest["class_names"]),
        channels=manifest["channels"],
        num_examples={name: split["examples"] for name, split in splits.items()},
        image_shape=None if shape is None else tuple(shape),
        version=manifest.get("source", {}).get("version"),
        kind="prepared shards",
        checksum=_checksum(splits),
    )

    def open_split(split: str) -> RecordsSource:
        shards = splits[split]["shards"]
        files = [os.fspath(folder / shard["file"]) for shard in shards]
        for file in files:
            refuse_special(file)
        return RecordsSource(
            files,
            [shard["examples"] for shard in shards],
            described.class_names,
            described.channels,
            labelled,
        )

    return Collection(described, open_split)
