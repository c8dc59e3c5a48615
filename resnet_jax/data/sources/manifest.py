"""The manifest of a prepared data set: every field is checked when it is read.

``resnet-jax prepare`` writes it, and keeps the same entries of shards in its
``progress.json`` while it works. ``docs/data.md`` describes the fields.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from resnet_jax.errors import UserError
from resnet_jax.storage import read_text

MANIFEST = "manifest.json"
FORMAT = "resnet_jax images"
VERSION = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[^/\\\0\ud800-\udfff]+")


class FieldError(ValueError):
    """A wrong field of a manifest or of ``progress.json``."""


def read_manifest(folder: epath.Path) -> dict[str, Any] | None:
    """The manifest of a prepared data set; None if there is none.

    Raises:
      UserError: it is damaged, or has a later version.
    """
    file = folder / MANIFEST
    try:
        text = read_text(file)
        if text is None:
            return None
        manifest = json.loads(text.removeprefix("\ufeff"))
        check(isinstance(manifest, dict), "it is not an object")
        if field(manifest, "format", str, "it") != FORMAT:
            raise FieldError(f"its format is {manifest['format']!r}")
        version = field(manifest, "version", int, "it")
        if version <= VERSION:
            _check_manifest(manifest)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{file} is damaged or not a manifest of resnet-jax prepare: {reason}; "
            "copy it again, or prepare the data again"
        ) from error
    if version > VERSION:
        raise UserError(
            f"{file} has version {version} of the layout, but this resnet_jax reads up "
            f"to {VERSION}; update it"
        )
    return manifest


def check(condition: bool, fault: str) -> None:
    """Raises FieldError unless a condition is true."""
    if not condition:
        raise FieldError(fault)


def field(content: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A field of an object; numbers are at least 0.

    Raises:
      FieldError: it is missing, or has another type.
    """
    check(name in content, f"{where} lacks {name}")
    value = content[name]
    right = isinstance(value, kind) and not isinstance(value, bool)
    check(right, f"{name} of {where} is {value!r:.50}, not {kind.__name__}")
    check(kind is not int or value >= 0, f"{name} of {where} is {value}, below 0")
    return value


def check_shard(entry: Any, where: str) -> None:
    """Raises FieldError unless ``entry`` describes a shard."""
    check(isinstance(entry, dict), f"{where} is {entry!r:.50}, not an object")
    for number in ("examples", "bytes"):
        field(entry, number, int, where)
    name = field(entry, "file", str, where)
    plain = _FILE_NAME.fullmatch(name) and name not in (".", "..")
    check(bool(plain), f"file of {where} is {name!r}, not the name of a file")
    digest = field(entry, "sha256", str, where)
    check(bool(_SHA256.fullmatch(digest)), f"sha256 of {where} is {digest!r:.80}")


def check_left_out(items: Any, where: str) -> None:
    """Raises FieldError unless ``items`` lists images that were left out."""
    for item in items:
        check(isinstance(item, dict), f"left_out of {where} holds {item!r:.50}")
        field(item, "index", int, f"left_out of {where}")
        field(item, "name", str, f"left_out of {where}")
        field(item, "reason", str, f"left_out of {where}")


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    names = field(manifest, "class_names", list, "it")
    check(bool(names), "class_names is empty")
    check(all(isinstance(name, str) for name in names), "class_names holds other types")
    check(len(set(names)) == len(names), "class_names holds a name twice")
    channels = field(manifest, "channels", int, "it")
    check(channels in (1, 3), f"channels is {channels}, not 1 or 3")
    shape = manifest.get("image_shape")
    if shape is not None:
        whole = isinstance(shape, list) and [type(side) for side in shape] == [int] * 3
        right = whole and min(shape) > 0 and shape[2] == channels
        check(right, f"image_shape is {shape!r:.50}, not [height, width, {channels}]")
    field(manifest, "settings", dict, "it")
    field(manifest, "source", dict, "it")
    splits = field(manifest, "splits", dict, "it")
    check(bool(splits), "splits is empty")
    files: set[str] = set()
    for name, split in splits.items():
        _check_split(split, f"split {name}", files)
    if "annotations" in manifest:
        _check_annotations(field(manifest, "annotations", dict, "it"), splits, files)


def _check_annotations(
    annotations: Mapping[str, Any], splits: Mapping[str, Any], files: set[str]
) -> None:
    """Checks the part of a data set for detection."""
    numbers = annotations.get("category_ids")
    whole = isinstance(numbers, list) and all(type(n) is int for n in numbers)
    check(numbers is None or whole, f"category_ids is {numbers!r:.50}")
    entries = field(annotations, "files", dict, "annotations")
    check(entries.keys() == splits.keys(), "annotations has other splits")
    for name, entry in entries.items():
        check_shard(entry, f"annotations of split {name}")
        check(entry["file"] not in files, f"it names {entry['file']} twice")
        files.add(entry["file"])
        same = entry["examples"] == splits[name]["examples"]
        check(same, f"annotations of split {name} have another number of examples")


def _check_split(split: Any, where: str, files: set[str]) -> None:
    """Checks a split; ``files`` are the shards of the splits before."""
    check(isinstance(split, dict), f"{where} is {split!r:.50}, not an object")
    shards = field(split, "shards", list, where)
    for number, entry in enumerate(shards):
        check_shard(entry, f"shard {number} of {where}")
        check(entry["file"] not in files, f"it names {entry['file']} twice")
        files.add(entry["file"])
    for unit in ("examples", "bytes"):
        stated, total = field(split, unit, int, where), sum(e[unit] for e in shards)
        fault = f"{where} states {stated} {unit}, but its shards hold {total}"
        check(stated == total, fault)
    check(split["examples"] > 0, f"{where} has no examples")
    check_left_out(field(split, "left_out", list, where), where)
