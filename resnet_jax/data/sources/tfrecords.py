"""Read tfds data sets in TFRecord without TensorFlow, to convert them.

TFRecord has no index: opening a split reads through its files once, from the length of
one record to the next.

A record is: uint64 length, uint32 checksum of the length, the data, uint32 checksum of
the data, all little-endian. The checksums are masked CRC-32C (tensorflow's
core/lib/io/record_writer.h).
"""

import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np

from resnet_jax.data.sources.base import Description, Example, FileReader
from resnet_jax.data.sources.splits import SplitCollection
from resnet_jax.data.sources.tfds import TfdsFeatures
from resnet_jax.errors import UserError

_LENGTH = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8


def masked_checksum(data: bytes) -> int:
    """CRC-32C, rotated right by 15 bits and offset, as TFRecord stores it."""
    checksum = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + _MASK_DELTA) & 0xFFFFFFFF


class TfRecordSource:
    """A split of a tfds data set in TFRecord files.

    Attributes:
      class_names: in the order of the labels.
      channels: 1 or 3.
    """

    def __init__(
        self,
        files: Sequence[str],
        counts: Sequence[int],
        features: TfdsFeatures,
        described: Description,
    ):
        """Indexes the files; ``files[i]`` must hold ``counts[i]`` records.

        Raises:
          UserError: a file is missing, cut short or damaged.
        """
        self._features = features
        self.class_names: Sequence[str] = described.class_names
        self.channels = described.channels
        places: list[tuple[int, int, int]] = []
        for number, (file, count) in enumerate(zip(files, counts, strict=True)):
            found = [(number, *place) for place in _frames(file)]
            if len(found) != count:
                raise UserError(
                    f"{file} holds {len(found)} records, but tfds wrote {count}; copy "
                    "it again"
                )
            places += found
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self._files = FileReader(files)
        self._decoders = features.decoders()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        number, start, size = (int(value) for value in self._places[index])
        name = f"{self._files.paths[number]}[{index}]"
        try:
            frame = self._files.read(number, start, size + _CHECKSUM.size)
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}") from error
        data = frame[:size]
        if len(frame) < size + _CHECKSUM.size or (
            _CHECKSUM.unpack_from(frame, size)[0] != masked_checksum(data)
        ):
            raise UserError(f"record {name} is damaged: its checksum differs")
        record = self._features.features.deserialize_example_np(
            data, decoders=self._decoders
        )
        label = int(record[self._features.label])
        return Example(record[self._features.image], label, name)


def _frames(path: str) -> Iterator[tuple[int, int]]:
    """Start and size of the data of each record."""
    try:
        with open(path, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            position = 0
            while position < end:
                header = file.read(_LENGTH.size)
                start = position + _LENGTH.size
                size, checksum = _LENGTH.unpack(header.ljust(_LENGTH.size, b"\0"))
                if len(header) == _LENGTH.size and (
                    checksum != masked_checksum(header[:8])
                ):
                    raise UserError(
                        f"{path} is not a TFRecord file, or it is damaged at byte "
                        f"{position}"
                    )
                position = start + size + _CHECKSUM.size
                if position > end:
                    raise UserError(f"{path} is cut short; copy it again")
                yield start, size
                file.seek(position)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


class TfRecordCollection(SplitCollection):
    """A tfds data set in TFRecord."""

    def __init__(self, builder: Any):
        """Opens a prepared tfds builder.

        Raises:
          UserError: the data set has no image or no class label.
        """
        self._builder = builder
        self._features = TfdsFeatures(builder)
        self.description = self._features.describe(builder)
        self._sources: dict[str, TfRecordSource] = {}

    def _open(self, split: str) -> TfRecordSource:
        if split not in self._sources:
            if "://" in str(self._builder.data_dir):
                raise UserError(
                    f"TFRecord files are read only from a disk; copy "
                    f"{self._builder.data_dir} there"
                )
            info = self._builder.info.splits[split]
            self._sources[split] = TfRecordSource(
                [os.fspath(file) for file in info.filepaths],
                info.shard_lengths,
                self._features,
                self.description,
            )
        return self._sources[split]
