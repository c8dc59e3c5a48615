"""Data sets that ``resnet-jax prepare`` made: our own shards of ArrayRecord."""

import bisect
import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from resnet_jax.data import records
from resnet_jax.data.sources.base import Description, Example
from resnet_jax.data.sources.splits import SplitCollection
from resnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Shard:
    """What array_record wants to know of a file; so it need not open it to count."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


class RecordsSource:
    """A split of a prepared data set; files are opened when they are first read.

    Records are read one by one: ArrayRecord's batched read was no faster on files of
    100 kB images (46,000 against 50,000 a second, far more than can be decoded).
    """

    def __init__(
        self,
        files: Sequence[str],
        counts: Sequence[int],
        class_names: Sequence[str],
        channels: int,
    ):
        """``counts[i]`` records in ``files[i]``."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.class_names, self.channels = class_names, channels
        self._files = list(files)
        self._ends = list(itertools.accumulate(counts))
        self._records = ArrayRecordDataSource(
            [_Shard(*each) for each in zip(files, counts, counts, strict=True)]
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        try:
            return records.unpack(self._records[index])
        except (UserError, ValueError, RuntimeError, OSError, IndexError) as error:
            if not 0 <= index < len(self):
                raise IndexError(f"example {index} of {len(self)}") from error
            file = self._files[bisect.bisect_right(self._ends, index)]
            raise UserError(
                f"shard {file} is missing or damaged at example {index}; "
                f"resnet-jax prepare --verify {os.path.dirname(file)} tells more"
            ) from error


class RecordsCollection(SplitCollection):
    """A prepared data set, in a folder or below a gs:// URL."""

    def __init__(self, folder: epath.Path, manifest: Mapping[str, Any]):
        """Describes what the manifest lists; opens no shard."""
        self._folder, self._splits = folder, manifest["splits"]
        shape = manifest.get("image_shape")
        self.description = Description(
            name=str(folder),
            class_names=tuple(manifest["class_names"]),
            channels=manifest["channels"],
            num_examples={
                name: split["examples"] for name, split in self._splits.items()
            },
            image_shape=None if shape is None else tuple(shape),
            version=manifest.get("source", {}).get("version"),
        )

    def _open(self, split: str) -> RecordsSource:
        shards = self._splits[split]["shards"]
        files = [self._folder / shard["file"] for shard in shards]
        return RecordsSource(
            [os.fspath(file) for file in files],
            [shard["examples"] for shard in shards],
            self.description.class_names,
            self.description.channels,
        )
