"""Write and check ArrayRecord shards. A kill at any moment leaves no partial shard."""

import dataclasses
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import (
    ArrayRecordReader,
    ArrayRecordWriter,
)

from resnet_jax.data.sources import Source, records
from resnet_jax.data.sources.folders import Names
from resnet_jax.errors import UserError
from resnet_jax.prepare.encoding import Encoding
from resnet_jax.storage import replacing


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """A shard to write.

    Attributes:
      file: its name.
      split: whose examples it holds.
      source: where they are read.
      indices: of the examples, in the order of the shard.
      names: of all examples of the source; None means that examples carry them.
    """

    file: str
    split: str
    source: Source
    indices: np.ndarray
    names: Names | None


def write_shard(
    job: ShardJob,
    folder: Path,
    encoding: Encoding,
    skip: bool,
    tick: Callable[[], None],
) -> dict[str, Any]:
    """Writes a shard, reads it back, and moves it to its name.

    Args:
      job: the shard.
      folder: where to write it.
      encoding: how images are stored.
      skip: leave out broken examples instead of raising.
      tick: called for each example; an exception of it ends the work.

    Returns:
      The shard's entry in the manifest: file, examples, bytes, sha256 and left_out.

    Raises:
      UserError: an image is broken, or the disk is full or faulty.
    """
    final = folder / job.file
    left_out: list[dict[str, Any]] = []
    checksums: list[int] = []
    try:
        with replacing(final) as partial:
            writer = ArrayRecordWriter(str(partial), records.WRITER_OPTIONS)
            for index in job.indices:
                tick()
                record = _record(job, int(index), encoding, skip, left_out)
                if record is not None:
                    writer.write(record)
                    checksums.append(zlib.crc32(record))
                if not writer.ok():
                    break  # close() raises the reason
            writer.close()
            if not _reads_back(partial, checksums):
                raise UserError(
                    f"shard {final} reads back differently than it was written: the "
                    "disk is full or faulty; give the same command again"
                )
            digest = _sha256(partial)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"shard {final} cannot be written: {error}; free space or give another "
            "output, and give the same command again"
        ) from error
    return {
        "file": job.file,
        "examples": len(checksums),
        "bytes": final.stat().st_size,
        "sha256": digest,
        "left_out": left_out,
    }


def _record(
    job: ShardJob,
    index: int,
    encoding: Encoding,
    skip: bool,
    left_out: list[dict[str, Any]],
) -> bytes | None:
    """The record of an example; None after noting a broken one in ``left_out``."""
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
                "examples out with --on-error skip"
            ) from error
        name = job.names[index] if job.names else f"{job.split}[{index}]"
        left_out.append({"index": index, "name": name, "reason": str(error)})
        return None


def _reads_back(file: Path, checksums: list[int]) -> bool:
    """Whether a shard holds records of these checksums, in their order."""
    reader = ArrayRecordReader(str(file), "readahead_buffer_size:0")
    try:
        return reader.num_records() == len(checksums) and all(
            zlib.crc32(reader.read([place])[0]) == checksum
            for place, checksum in enumerate(checksums)
        )
    except (RuntimeError, ValueError, IndexError):
        return False
    finally:
        reader.close()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def shard_fault(folder: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a finished shard of a manifest's entry, or None."""
    file = folder / entry["file"]
    if not file.is_file():
        return f"shard {file} is missing"
    size = file.stat().st_size
    if size != entry["bytes"]:
        return f"shard {file} has {size} bytes instead of {entry['bytes']}"
    if _sha256(file) != entry["sha256"]:
        return f"shard {file} is damaged: its checksum differs"
    return None
