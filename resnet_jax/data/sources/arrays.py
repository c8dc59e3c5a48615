"""Small data sets of raw pixels: CIFAR's binary version and idx files."""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from resnet_jax.data.sources.base import (
    Description,
    Example,
    check_label,
    read_bytes,
    read_text,
)
from resnet_jax.data.sources.splits import Collection
from resnet_jax.errors import UserError
from resnet_jax.storage import open_regular


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
            if not (folder / test_file).exists():
                continue
            names = _cifar_names(folder / names_file, classes)
            sources = {}
            for split, files in (("train", train_files), ("test", [test_file])):
                parts = [_read_cifar(folder / f, label_bytes, names) for f in files]
                images, labels = map(np.concatenate, zip(*parts, strict=True))
                sources[split] = ArraySource(images, labels, names, f"{folder}/{split}")
            return array_collection(folder, "CIFAR binary files", sources)
    return None


def _cifar_names(file: Path, classes: int) -> list[str]:
    """The names of the classes, one a line; their numbers without the file."""
    if not file.exists():
        return [str(label) for label in range(classes)]
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if len(names) != classes or len(set(names)) != classes:
        raise UserError(
            f"{file} has {len(names)} names of classes, {len(set(names))} of them "
            f"different; expected {classes}, one a line"
        )
    return names


def _read_cifar(
    file: Path, label_bytes: int, class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) and labels; the last label byte is the fine class."""
    if not file.exists():
        raise UserError(f"{file} is missing among the CIFAR binary files")
    record = label_bytes + 32 * 32 * 3
    raw = np.frombuffer(read_bytes(str(file), 0, -1, str(file)), np.uint8)
    if not raw.size or raw.size % record:
        raise UserError(
            f"{file} has {raw.size} bytes, which is not a multiple of {record}: it is "
            "damaged or not a CIFAR binary file"
        )
    rows = raw.reshape(-1, record)
    images = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = rows[:, label_bytes - 1]
    _check_labels(labels, len(class_names), file)
    return np.ascontiguousarray(images), labels


def _check_labels(labels: np.ndarray, num_classes: int, file: Path) -> None:
    """Raises UserError for the first label that is not the label of a class."""
    index = int(np.argmax(labels >= num_classes))
    check_label(int(labels[index]), num_classes, f"image {index} of {file}")


def open_idx(root: Path) -> Collection | None:
    """MNIST or a similar set in four idx files, gzipped or not; None without them.

    Raises:
      UserError: files are missing or damaged.
    """
    found: list[tuple[Path, np.ndarray]] = []
    for split in ("train", "t10k"):
        for content, ndim in (("images-idx3", 3), ("labels-idx1", 1)):
            stems = (
                f"{split}-{content}-ubyte",
                f"{split}-{content}".replace("-idx", ".idx"),
            )
            candidates = [root / (stem + end) for stem in stems for end in ("", ".gz")]
            file = next((path for path in candidates if path.exists()), None)
            if file is None:
                if not found:
                    return None
                raise UserError(f"{candidates[0]} is missing among the idx files")
            found.append((file, _read_idx(file, ndim)))
    # As in folders, the training split has all classes.
    names = [str(label) for label in range(int(found[1][1].max()) + 1)]
    sources = {}
    for split, stem, part in (
        ("train", "train", found[:2]),
        ("test", "t10k", found[2:]),
    ):
        (_, images), (file, labels) = part
        _check_labels(labels, len(names), file)
        sources[split] = ArraySource(images[..., None], labels, names, f"{root}/{stem}")
    return array_collection(root, "idx files", sources)


def _read_idx(file: Path, ndim: int) -> np.ndarray:
    """The unsigned bytes of an idx file with ``ndim`` dimensions."""
    try:
        with open_regular(file) as stored:
            opened = gzip.GzipFile(fileobj=stored) if file.suffix == ".gz" else stored
            magic, *shape = struct.unpack(f">I{ndim}I", opened.read(4 + 4 * ndim))
            if magic != 0x800 + ndim:
                raise ValueError(
                    f"it does not hold unsigned bytes in {ndim} dimensions"
                )
            if 0 in shape:
                raise ValueError(f"its shape {tuple(shape)} is empty")
            # In pieces, since a header may state any size and an archive hold any.
            raw, size = bytearray(), math.prod(shape)
            while len(raw) <= size and (piece := opened.read(2**20)):
                raw += piece
        if len(raw) != size:
            raise ValueError(f"it does not hold the {size} bytes that it states")
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} is damaged or not an idx file: {reason}") from error
    except MemoryError as error:
        raise UserError(f"{file} is larger than the memory") from error
    return np.frombuffer(raw, np.uint8).reshape(shape)
