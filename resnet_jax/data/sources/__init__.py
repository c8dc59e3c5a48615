"""Sources: random access to labelled images as they are stored.

A source gives example i. Files at hand (a folder of class folders, CIFAR's binary
files, MNIST's idx files) are found by their path; all else is a tfds data set by its
name, read from ArrayRecord without TensorFlow.
"""

import contextlib
import dataclasses
import difflib
import gzip
import importlib.util
import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from resnet_jax.config import Config
from resnet_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Example:
    """An image as stored and its label.

    Attributes:
      image: an encoded file's bytes, or a uint8 array (h, w, c).
      label: index of the class.
      name: file or index, for error sentences.
    """

    image: bytes | np.ndarray
    label: int
    name: str


class Source(Protocol):
    """Labelled images by index.

    Attributes:
      class_names: the classes' names in the order of the labels.
      channels: 1 for grey images, 3 for colour.
    """

    class_names: Sequence[str]
    channels: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Example ``index``, 0 <= index < len(self)."""
        ...


class Subset:
    """The examples of a source at the given indices."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices
        self.class_names, self.channels = source.class_names, source.channels

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]


class ArraySource:
    """Images that are already in memory, uint8 (n, h, w, c)."""

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

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        label = int(self._labels[index])
        return Example(self._images[index], label, f"{self._name}[{index}]")


class FolderSource:
    """``root/split/CLASS/IMAGE``: classes in the order of their names, as torch's."""

    channels = 3

    def __init__(self, root: Path, split: str, class_names: Sequence[str] | None):
        """Lists the files; ``class_names`` are those of the training split, if known.

        Raises:
          UserError: a folder is missing or empty, or has a class of its own.
        """
        folder = root / split
        found = _subfolders(folder)
        if not found:
            raise UserError(
                f"{folder} has no class folders; expected {folder}/CLASS/IMAGE.jpg"
            )
        self.class_names = found if class_names is None else class_names
        unknown = sorted(set(found) - set(self.class_names))
        if unknown:
            raise UserError(
                f"{folder} has the class {unknown[0]}, which the training split lacks"
            )
        label_of = {name: label for label, name in enumerate(self.class_names)}
        self._files = [
            (file, label_of[name])
            for name in found
            for file in sorted((folder / name).rglob("*"))
            if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "."
        ]
        if not self._files:
            raise UserError(
                f"the class folders of {folder} hold no images "
                f"({', '.join(IMAGE_SUFFIXES)})"
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        file, label = self._files[index]
        try:
            return Example(file.read_bytes(), label, str(file))
        except OSError as error:
            raise UserError(f"image {file} cannot be read: {error.strerror}") from error


class TfdsSource:
    """A split of a tfds image classification data set, prepared as ArrayRecord."""

    def __init__(self, builder: Any, split: str):
        """Opens ``split``, sub-splits such as ``train[:90%]`` included.

        Raises:
          UserError: there is no such split, or no image or label in it.
        """
        import tensorflow_datasets as tfds

        features = dict(builder.info.features)
        image_keys = [
            key
            for key, feature in features.items()
            if isinstance(feature, tfds.features.Image)
        ]
        label_keys = [
            key
            for key, feature in features.items()
            if isinstance(feature, tfds.features.ClassLabel)
        ]
        if not image_keys or not label_keys:
            raise UserError(
                f"tfds data set {builder.info.name} has the features "
                f"{', '.join(features)}: expected an image and a class label"
            )
        base = split.split("[")[0]
        if not all(
            part.split("[")[0] in builder.info.splits for part in split.split("+")
        ):
            raise UserError(
                f"tfds data set {builder.info.name} has no split {base!r}; its splits "
                f"are {', '.join(builder.info.splits)}"
            )
        self._image_key, self._label_key = image_keys[0], label_keys[0]
        self._name = f"{builder.info.full_name}/{split}"
        self._records = builder.as_data_source(
            split=split, decoders={self._image_key: tfds.decode.SkipDecoding()}
        )
        self.class_names = features[self._label_key].names
        self.channels = features[self._image_key].shape[-1] or 3

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        label = int(record[self._label_key])
        return Example(record[self._image_key], label, f"{self._name}[{index}]")


def open_sources(config: Config) -> tuple[Source, Source]:
    """The training and the test source that ``config.data`` names.

    Raises:
      UserError: the data are not there, in one sentence that says what to do.
    """
    data = config.data
    splits = (data.train_split, data.test_split)
    if data.path is None:
        builder = _tfds_builder(data.name, data.data_dir)
        return TfdsSource(builder, splits[0]), TfdsSource(builder, splits[1])
    root = Path(data.path).expanduser()
    if not root.exists():
        raise UserError(
            f"data.path {root} does not exist; give the folder that holds "
            f"{splits[0]}/CLASS/IMAGE, CIFAR's .bin or MNIST's idx files"
        )
    if not root.is_dir():
        raise UserError(f"data.path {root} is a file; unpack it and give the folder")
    for reader in (_cifar_binary, _idx):
        found = reader(root)
        if found is not None:
            return found
    for split in splits:
        if not (root / split).is_dir():
            raise UserError(
                f"{root} has no folder {split}; it holds "
                f"{', '.join(_subfolders(root)) or 'no folders'}: "
                "set data.train_split and data.test_split"
            )
    train = FolderSource(root, splits[0], None)
    return train, FolderSource(root, splits[1], train.class_names)


def _subfolders(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )


def _tfds_builder(name: str, data_dir: str | None) -> Any:
    import absl.logging
    import tensorflow_datasets as tfds

    from resnet_jax.data import digits

    # tfds warns of every data set that is not prepared yet.
    quiet = min(absl.logging.get_verbosity(), absl.logging.ERROR)
    absl.logging.set_verbosity(quiet)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"there is no tfds data set {name}; {hint}For files of your own give "
            "data.path"
        ) from None
    if builder.is_prepared():
        stored_as = builder.info.file_format.value
        if stored_as != "array_record":
            raise UserError(
                f"tfds data set {name} under {builder.data_dir} is prepared as "
                f"{stored_as}; prepare it as ArrayRecord in another data.data_dir "
                "(tfds build --file_format=array_record)"
            )
        return builder
    if not isinstance(builder, digits.Digits) and not _has_tensorflow():
        raise UserError(
            f"tfds data set {name} is not prepared under {builder.data_dir}; "
            "pip install 'resnet_jax[tensorflow]' to prepare it here, or give its "
            "files with data.path"
        )
    is_ours = isinstance(builder, digits.Digits)
    # tfds speaks of a download of unknown size where there is none.
    silence = contextlib.redirect_stdout(io.StringIO())
    try:
        with silence if is_ours else contextlib.nullcontext():
            (tfds.disable_progress_bar if is_ours else tfds.enable_progress_bar)()
            builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        raise UserError(
            f"tfds data set {name} cannot be prepared in {builder.data_dir}: {error}; "
            "set data.data_dir to a folder you can write to"
        ) from error
    return builder


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


# (files of the training set, file of the test set, label bytes, names' file)
_CIFAR_LAYOUTS = (
    (
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        "test_batch.bin",
        1,
        "batches.meta.txt",
    ),
    (["train.bin"], "test.bin", 2, "fine_label_names.txt"),
)


def _cifar_binary(root: Path) -> tuple[Source, Source] | None:
    """CIFAR-10 or CIFAR-100 in the binary version of its distribution."""
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-100-binary"):
        for train_files, test_file, label_bytes, names_file in _CIFAR_LAYOUTS:
            if not (folder / test_file).is_file():
                continue
            num_classes = 10 if label_bytes == 1 else 100
            names = [str(label) for label in range(num_classes)]
            if (folder / names_file).is_file():
                names = (folder / names_file).read_text().split()
            parts = [_read_cifar(folder / file, label_bytes) for file in train_files]
            images, labels = map(np.concatenate, zip(*parts, strict=True))
            test_images, test_labels = _read_cifar(folder / test_file, label_bytes)
            return (
                ArraySource(images, labels, names, f"{folder}/train"),
                ArraySource(test_images, test_labels, names, f"{folder}/test"),
            )
    return None


def _read_cifar(file: Path, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) and labels; the last label byte is the fine class."""
    if not file.is_file():
        raise UserError(f"{file} is missing beside the other CIFAR binary files")
    record = label_bytes + 32 * 32 * 3
    raw = np.fromfile(file, np.uint8)
    if not raw.size or raw.size % record:
        raise UserError(
            f"{file} has {raw.size} bytes, not a multiple of {record}: it is damaged "
            "or not a CIFAR binary file"
        )
    rows = raw.reshape(-1, record)
    images = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), rows[:, label_bytes - 1]


def _idx(root: Path) -> tuple[Source, Source] | None:
    """MNIST, Fashion-MNIST and their like: the four idx files, gzipped or not."""
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
                raise UserError(
                    f"{candidates[0]} is missing beside the other idx files"
                )
            arrays.append(_read_idx(file))
    train_images, train_labels, test_images, test_labels = arrays
    highest = max(int(train_labels.max()), int(test_labels.max()))
    names = [str(label) for label in range(highest + 1)]
    return (
        ArraySource(train_images[..., None], train_labels, names, f"{root}/train"),
        ArraySource(test_images[..., None], test_labels, names, f"{root}/t10k"),
    )


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
