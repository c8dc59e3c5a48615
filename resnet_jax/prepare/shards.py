"""Write and check ArrayRecord shards. A kill at any moment leaves no partial shard."""

import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from resnet_jax.data.sources import Source, records
from resnet_jax.data.sources.folders import Names
from resnet_jax.errors import UserError
from resnet_jax.prepare.encoding import Encoding
from resnet_jax.storage import open_regular, replacing


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """A shard to write.

    Attributes:
      file: its name.
      split: whose examples it holds.
      source: of the split.
      indices: of the examples, in the order of the shard.
    """

    file: str
    split: str
    source: Source
    indices: np.ndarray


def file_names(source: Source) -> Names | None:
    """The names of a source's files; None if it is not a list of files."""
    return getattr(source, "names", None)


def write_shard(
    job: ShardJob,
    folder: Path,
    encoding: Encoding,
    skip: bool,
    tick: Callable[[], None],
) -> dict[str, Any]:
    """Writes a shard, reads it back, and moves it to its name.

    Calls ``tick`` before each example; it may raise an exception to stop the work. With
    ``skip``, broken examples are left out.

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
            for record in _records(job, encoding, skip, tick, left_out):
                writer.write(record)
                checksums.append(zlib.crc32(record))
                if not writer.ok():
                    break  # close() raises the reason
            writer.close()
            if not _reads_back(partial, checksums):
                raise UserError(
                    f"shard {final} reads back differently than it was written: the "
                    "disk is full or faulty; run the same command again"
                )
            digest = _sha256(partial)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"shard {final} cannot be written: {error}; free space or give another "
            "output, and run the same command again"
        ) from error
    return {
        "file": job.file,
        "examples": len(checksums),
        "bytes": final.stat().st_size,
        "sha256": digest,
        "left_out": left_out,
    }


def _records(
    job: ShardJob,
    encoding: Encoding,
    skip: bool,
    tick: Callable[[], None],
    left_out: list[dict[str, Any]],
) -> Iterator[bytes]:
    """The records of a shard; appends what it skips to ``left_out``."""
    source, names = job.source, file_names(job.source)
    for index in map(int, job.indices):
        tick()
        try:
            example = source[index]
            image = encoding.encode(example, source.channels)
        except UserError as error:
            if not skip:
                raise UserError(
                    f"example {index} of {job.split} is broken: {error}, or leave such "
                    "examples out with --on-error skip"
                ) from error
            name = names[index] if names else f"{job.split}[{index}]"
            left_out.append({"index": index, "name": name, "reason": str(error)})
        else:
            name = names[index] if names else example.name
            yield records.pack(example.label, name, image)


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
    with open_regular(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type]


def shard_fault(folder: Path, entry: dict[str, Any]) -> str | None:
    """How a shard differs from its entry in the manifest; None if it is whole."""
    file = folder / entry["file"]
    if not file.is_file():
        special = file.exists()
        return f"shard {file} is {'not a regular file' if special else 'missing'}"
    size = file.stat().st_size
    if size != entry["bytes"]:
        return f"shard {file} has {size} bytes instead of {entry['bytes']}"
    if _sha256(file) != entry["sha256"]:
        return f"shard {file} is damaged: its checksum differs"
    return None
