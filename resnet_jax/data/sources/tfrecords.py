"""Read tfds data sets in TFRecord without TensorFlow, to convert them.

TFRecord has no index: opening a split reads through its files once, from the length of
one record to the next.

A record is: uint64 length, uint32 checksum of the length, the data, uint32 checksum of
the data, all little-endian. The checksums are masked CRC-32C (tensorflow's
core/lib/io/record_writer.h).
"""

import dataclasses
import functools
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np

from resnet_jax.data.sources.base import Example, read_bytes
from resnet_jax.data.sources.splits import Collection
from resnet_jax.data.sources.tfds import TfdsFeatures
from resnet_jax.errors import UserError
from resnet_jax.storage import open_regular

_LENGTH = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8


def masked_checksum(data: bytes) -> int:
    """CRC-32C, rotated right by 15 bits and offset, as TFRecord stores it."""
    checksum = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + _MASK_DELTA) & 0xFFFFFFFF


@dataclasses.dataclass(eq=False)
class TfRecordSource:
    """A split of a tfds data set in TFRecord files.

    Attributes:
      files: the files of the split.
      places: int64 (n, 3), the file, first byte and size of each record.
      features: reads the records.
      class_names: in the order of the labels.
      channels: 1 or 3.
    """

    files: Sequence[str]
    places: np.ndarray
    features: TfdsFeatures
    class_names: Sequence[str]
    channels: int

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        number, start, size = map(int, self.places[index])
        name = f"{self.files[number]}[{index}]"
        frame = read_bytes(self.files[number], start, size + _CHECKSUM.size, name)
        data, checksum = frame[:size], frame[size:]
        if checksum != _CHECKSUM.pack(masked_checksum(data)):
            raise UserError(f"record {name} is damaged: its checksum differs")
        return self.features.example(self.features.parse(data), name)


def open_tfrecords(builder: Any) -> Collection:
    """The data set of a tfds builder that is prepared as TFRecord.

    Raises:
      UserError: the data set has no image or no class label, or is not on a disk.
    """
    if "://" in str(builder.data_dir):
        raise UserError(
            f"TFRecord files are read only from a disk; copy {builder.data_dir} there"
        )
    features = TfdsFeatures(builder)
    described = features.describe(builder)

    @functools.cache
    def open_split(split: str) -> TfRecordSource:
        info = builder.info.splits[split]
        files = [os.fspath(file) for file in info.filepaths]
        places: list[tuple[int, int, int]] = []
        for number, (file, count) in enumerate(
            zip(files, info.shard_lengths, strict=True)
        ):
            found = [(number, *place) for place in _frames(file)]
            if len(found) != count:
                raise UserError(
                    f"{file} holds {len(found)} records, but tfds wrote {count}; copy "
                    "it again"
                )
            places += found
        return TfRecordSource(
            files,
            np.array(places, np.int64).reshape(-1, 3),
            features,
            described.class_names,
            described.channels,
        )

    return Collection(described, open_split)


def _frames(path: str) -> Iterator[tuple[int, int]]:
    """Start and size of the data of each record."""
    try:
        with open_regular(path) as file:
            end = os.fstat(file.fileno()).st_size
            position = 0
            while position < end:
                header = file.read(_LENGTH.size)
                if len(header) < _LENGTH.size:
                    raise UserError(f"{path} is cut short; copy it again")
                size, checksum = _LENGTH.unpack(header)
                if checksum != masked_checksum(header[:8]):
                    raise UserError(
                        f"{path} is not a TFRecord file, or it is damaged at byte "
                        f"{position}"
                    )
                start = position + _LENGTH.size
                position = start + size + _CHECKSUM.size
                if position > end:
                    raise UserError(f"{path} is cut short; copy it again")
                yield start, size
                file.seek(position)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
