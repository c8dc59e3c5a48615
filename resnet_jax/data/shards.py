"""Writing shards of ArrayRecord so that a kill at any moment leaves none half done."""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import (
    ArrayRecordReader,
    ArrayRecordWriter,
)

from resnet_jax.data import records
from resnet_jax.data.encoding import Encoding
from resnet_jax.data.sources import Source
from resnet_jax.data.sources.folders import Names
from resnet_jax.errors import UserError

PARTIAL = ".partial"
"""Ending of the name of a file that is being written."""

_CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard to write.

    Attributes:
      file: its name.
      split: whose examples it holds.
      source: where they are read.
      indices: of the examples, in the order of the shard.
      names: of the examples, or None for those that the source gives.
    """

    file: str
    split: str
    source: Source
    indices: np.ndarray
    names: Names | None


def write(
    job: Job, folder: Path, encoding: Encoding, skip: bool, tick: Callable[[], None]
) -> dict[str, Any]:
    """Writes a shard, reads it back, and gives it its name.

    Args:
      job: what to write.
      folder: where to.
      encoding: how images are stored.
      skip: leave out what is broken instead of raising.
      tick: called for each example; what it raises ends the work.

    Returns:
      The shard's entry in the manifest: file, examples, bytes, sha256 and left_out.

    Raises:
      UserError: an image is broken, or the disk is full or faulty.
    """
    partial = folder / (job.file + PARTIAL)
    left_out: list[dict[str, Any]] = []
    checksums: list[int] = []
    try:
        writer = ArrayRecordWriter(str(partial), records.WRITER_OPTIONS)
        for index in job.indices:
            tick()
            record = _record(job, int(index), encoding, skip, left_out)
            if record is not None:
                writer.write(record)
                checksums.append(zlib.crc32(record))
            if not writer.ok():
                break  # what is wrong is told by close()
        writer.close()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"shard {partial} cannot be written: {error}; free space or give another "
            "output, and give the same command again"
        ) from error
    _compare(partial, checksums)
    digest = sha256(partial)
    _settle(partial, folder / job.file)
    return {
        "file": job.file,
        "examples": len(checksums),
        "bytes": (folder / job.file).stat().st_size,
        "sha256": digest,
        "left_out": left_out,
    }


def _record(
    job: Job,
    index: int,
    encoding: Encoding,
    skip: bool,
    left_out: list[dict[str, Any]],
) -> bytes | None:
    source = job.source
    try:
        example = source[index]
        if not 0 <= example.label < len(source.class_names):
            raise UserError(f"image {example.name} has no label ({example.label})")
        name = example.name if job.names is None else job.names[index]
        image = encoding.encode(example, source.channels)
        return records.pack(example.label, name, image)
    except UserError as error:
        if not skip:
            raise UserError(
                f"example {index} of {job.split} is broken: {error}, or leave such "
                "out with --on-error skip"
            ) from error
        name = job.names[index] if job.names else f"{job.split}[{index}]"
        left_out.append({"index": index, "name": name, "reason": str(error)})
        return None


def _compare(file: Path, checksums: list[int]) -> None:
    """Reads a shard back, and compares each record with what was to be written."""
    reader = ArrayRecordReader(str(file), "readahead_buffer_size:0")
    try:
        same = reader.num_records() == len(checksums) and all(
            zlib.crc32(reader.read([place])[0]) == checksum
            for place, checksum in enumerate(checksums)
        )
    except (RuntimeError, ValueError, IndexError):
        same = False
    finally:
        reader.close()
    if not same:
        raise UserError(
            f"shard {file} reads back otherwise than it was written: the disk is full "
            "or faulty; give the same command again"
        )


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _settle(partial: Path, final: Path) -> None:
    """Renames a file that is whole, and waits until the disk has it."""
    with open(partial, "rb") as opened:
        os.fsync(opened.fileno())
    os.replace(partial, final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, content: Any) -> None:
    """Replaces a JSON file in one step."""
    partial = file.with_name(file.name + PARTIAL)
    partial.write_text(json.dumps(content, indent=1) + "\n")
    _settle(partial, file)


def check(folder: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a finished shard, or None.

    Args:
      folder: where it lies.
      entry: of the manifest.
    """
    file = folder / entry["file"]
    if not file.is_file():
        return f"shard {file} is missing"
    size = file.stat().st_size
    if size != entry["bytes"]:
        return f"shard {file} has {size} bytes and had {entry['bytes']}"
    if sha256(file) != entry["sha256"]:
        return f"shard {file} is damaged: its checksum is another"
    return None
