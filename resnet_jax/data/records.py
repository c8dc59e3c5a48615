"""The layout of prepared data sets: shards of ArrayRecord and a manifest.

A record is, with little-endian integers,

    int32 label | uint32 length of the name | name in UTF-8 | the image

where the image is the bytes of an encoded file, as it was found or as ``prepare``
encoded it again. Shards have ``group_size:1``, so that each record can be read alone,
and are not compressed: images are already. ``docs/data.md`` shows a reader.
"""

import json
import struct
from typing import Any

from etils import epath

from resnet_jax.data.sources.base import Example
from resnet_jax.errors import UserError

WRITER_OPTIONS = "group_size:1,uncompressed"
MANIFEST = "manifest.json"
FORMAT = "resnet_jax images"
VERSION = 1

_HEADER = struct.Struct("<iI")


def pack(label: int, name: str, image: bytes) -> bytes:
    """A record."""
    encoded = name.encode("utf-8", "surrogateescape")
    return b"".join((_HEADER.pack(label, len(encoded)), encoded, image))


def unpack(record: bytes) -> Example:
    """The example of a record.

    Raises:
      UserError: the bytes are no record.
    """
    try:
        label, length = _HEADER.unpack_from(record)
        end = _HEADER.size + length
        name = record[_HEADER.size : end].decode("utf-8", "surrogateescape")
    except (struct.error, UnicodeDecodeError) as error:
        raise UserError(f"a record of {len(record)} bytes is none of ours") from error
    return Example(record[end:], label, name)


def shard_name(split: str, index: int, count: int) -> str:
    """File name of shard ``index`` of ``count``."""
    return f"{split}-{index:05d}-of-{count:05d}.array_record"


def read_manifest(folder: epath.Path) -> dict[str, Any] | None:
    """The manifest of a prepared data set, or None where there is none.

    Raises:
      UserError: it is damaged, or of a later version of the layout.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    try:
        manifest = json.loads(file.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}")
        version = manifest["version"]
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                shard["file"], shard["examples"], shard["bytes"], shard["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged or no manifest of resnet-jax prepare: {error}"
        ) from error
    if version > VERSION:
        raise UserError(
            f"{file} has version {version} of the layout, and this resnet_jax reads "
            f"up to {VERSION}; update it"
        )
    return manifest
