"""Small data sets of raw pixels: CIFAR's binary version and idx files."""

import gzip
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from resnet_jax.data.sources.base import Description, Example
from resnet_jax.data.sources.splits import Collection
from resnet_jax.errors import UserError


class ArraySource:
    """Images in memory, uint8 (n, h, w, c)."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        class_names: Sequence[str],
        name: str,
    ):
        if len(images) != len(labels):
            raise UserError(f"{name} has {len(images)} images and {len(labels)} labels")
        self._images, self._labels, self._name = images, labels, name
        self.class_names, self.channels = class_names, images.shape[-1]
        self.image_shape = images.shape[1:]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        label = int(self._labels[index])
        return Example(self._images[index], label, f"{self._name}[{index}]")

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels at the given indices, copied."""
        return np.take(self._images, indices, axis=0), self._labels[indices]


def array_collection(
    folder: Path, kind: str, sources: Mapping[str, ArraySource]
) -> Collection:
    """Splits in memory, read from the files of ``folder``."""
    first = next(iter(sources.values()))
    description = Description(
        name=str(folder),
        class_names=tuple(first.class_names),
        channels=first.channels,
        num_examples={split: len(source) for split, source in sources.items()},
        image_shape=first.image_shape,
        kind=kind,
    )
    return Collection(description, sources.__getitem__)


# Training files, test file, class names' file, label bytes and number of classes.
_CIFAR_LAYOUTS = (
    (
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        *("test_batch.bin", "batches.meta.txt", 1, 10),
    ),
    (["train.bin"], "test.bin", "fine_label_names.txt", 2, 100),
)


def open_cifar(root: Path) -> Collection | None:
    """CIFAR-10 or CIFAR-100 in the binary version; None if ``root`` has neither.

    Raises:
      UserError: files are missing or damaged.
    """
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-100-binary"):
        for train_files, test_file, names_file, label_bytes, classes in _CIFAR_LAYOUTS:
            if not (folder / test_file).is_file():
                continue
            names = [str(label) for label in range(classes)]
            if (folder / names_file).is_file():
                names = (folder / names_file).read_text().split()
            sources = {}
            for split, files in (("train", train_files), ("test", [test_file])):
                parts = [_read_cifar(folder / file, label_bytes) for file in files]
                images, labels = map(np.concatenate, zip(*parts, strict=True))
                sources[split] = ArraySource(images, labels, names, f"{folder}/{split}")
            return array_collection(folder, "CIFAR binary files", sources)
    return None


def _read_cifar(file: Path, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) and labels; the last label byte is the fine class."""
    if not file.is_file():
        raise UserError(f"{file} is missing among the CIFAR binary files")
    record = label_bytes + 32 * 32 * 3
    raw = np.fromfile(file, np.uint8)
    if not raw.size or raw.size % record:
        raise UserError(
            f"{file} has {raw.size} bytes, which is not a multiple of {record}: it is "
            "damaged or not a CIFAR binary file"
        )
    rows = raw.reshape(-1, record)
    images = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), rows[:, label_bytes - 1]


def open_idx(root: Path) -> Collection | None:
    """MNIST or a similar set in four idx files, gzipped or not; None without them.

    Raises:
      UserError: files are missing or damaged.
    """
    arrays: list[np.ndarray] = []
    for split in ("train", "t10k"):
        for content in ("images-idx3", "labels-idx1"):
            stems = (
                f"{split}-{content}-ubyte",
                f"{split}-{content}".replace("-idx", ".idx"),
            )
            candidates = [root / (stem + end) for stem in stems for end in ("", ".gz")]
            file = next((path for path in candidates if path.is_file()), None)
            if file is None:
                if not arrays:
                    return None
                raise UserError(f"{candidates[0]} is missing among the idx files")
            arrays.append(_read_idx(file))
    highest = max(int(labels.max()) for labels in arrays[1::2])
    names = [str(label) for label in range(highest + 1)]
    train = ArraySource(arrays[0][..., None], arrays[1], names, f"{root}/train")
    test = ArraySource(arrays[2][..., None], arrays[3], names, f"{root}/t10k")
    return array_collection(root, "idx files", {"train": train, "test": test})


def _read_idx(file: Path) -> np.ndarray:
    """An idx file of unsigned bytes."""
    try:
        raw = file.read_bytes()
        if file.suffix == ".gz":
            raw = gzip.decompress(raw)
        zeros, dtype_code, ndim = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{ndim}I", raw, 4)
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim)
        if zeros or dtype_code != 8:
            raise ValueError("not an idx file of unsigned bytes")
        return values.reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{file} is damaged or not an idx file: {error}") from error
