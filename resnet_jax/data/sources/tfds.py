"""Data sets of tensorflow_datasets by name, read from ArrayRecord."""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resnet_jax.data.sources.base import (
    Description,
    Example,
    check_label,
    refuse_special,
)
from resnet_jax.data.sources.splits import Collection
from resnet_jax.environment import how_to_install
from resnet_jax.errors import UserError
from resnet_jax.storage import locate


class TfdsFeatures:
    """The image and label features of a tfds data set."""

    def __init__(self, builder: Any):
        """Finds the features.

        Raises:
          UserError: there is no image or no class label.
        """
        import tensorflow_datasets as tfds

        self._features = features = builder.info.features

        def first(kind: type) -> str | None:
            return next((k for k, f in features.items() if isinstance(f, kind)), None)

        image, label = first(tfds.features.Image), first(tfds.features.ClassLabel)
        if image is None or label is None:
            raise UserError(
                f"tfds data set {builder.info.name} has the features "
                f"{', '.join(features)}: expected an image and a class label"
            )
        self._image, self._label = image, label
        # The image stays as stored.
        self.decoders = {image: tfds.decode.SkipDecoding()}

    def describe(self, builder: Any) -> Description:
        """The data set's description, from tfds's metadata."""
        shape, info = self._features[self._image].shape, builder.info
        return Description(
            name=f"tfds data set {info.full_name}",
            class_names=tuple(self._features[self._label].names),
            channels=shape[-1] or 3,
            num_examples={name: s.num_examples for name, s in info.splits.items()},
            image_shape=None if None in shape else tuple(shape),
            version=str(info.version),
            kind="tfds",
        )

    def parse(self, record: bytes) -> dict[str, Any]:
        """The features of a serialized record."""
        return self._features.deserialize_example_np(record, decoders=self.decoders)

    def example(self, record: Mapping[str, Any], name: str) -> Example:
        """The example of a record's features.

        Raises:
          UserError: it has no label.
        """
        count = self._features[self._label].num_classes
        label = check_label(int(record[self._label]), count, f"image {name}")
        return Example(record[self._image], label, name)


@dataclasses.dataclass(eq=False)
class TfdsSource:
    """A split of a tfds image classification data set in ArrayRecord."""

    records: Sequence[Mapping[str, Any]]
    features: TfdsFeatures
    class_names: Sequence[str]
    channels: int
    name: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        return self.features.example(self.records[index], f"{self.name}[{index}]")


def open_tfds(name: str, data_dir: str | None) -> Collection:
    """The data set ``NAME`` or ``NAME:VERSION`` below ``data_dir``.

    ``data_dir`` is a folder or gs:// URL; None means tfds's default. The data set is
    prepared if necessary.

    Raises:
      UserError: there is no such data set, or it cannot be prepared here.
    """
    builder = prepared_builder(name, data_dir)
    features = TfdsFeatures(builder)
    described = features.describe(builder)

    def open_split(split: str) -> TfdsSource:
        for file in builder.info.splits[split].filepaths:
            refuse_special(file)
        return TfdsSource(
            builder.as_data_source(split=split, decoders=features.decoders),
            features,
            described.class_names,
            described.channels,
            f"{builder.info.full_name}/{split}",
        )

    return Collection(described, open_split)


def find_builder(name: str, data_dir: str | None) -> Any:
    """The tfds builder of a data set, prepared or not.

    Raises:
      UserError: there is no such data set.
    """
    import absl.logging
    import tensorflow_datasets as tfds

    from resnet_jax.data import digits  # noqa: F401 - registers the name with tfds

    # tfds warns of every unprepared data set.
    quiet = min(absl.logging.get_verbosity(), absl.logging.ERROR)
    absl.logging.set_verbosity(quiet)
    where = None if data_dir is None else os.fspath(locate(data_dir))
    # tfds opens these by their path.
    folder = Path(where or Path.home() / "tensorflow_datasets", name.partition(":")[0])
    for file in folder.glob("**/*.json"):
        refuse_special(file)
    try:
        return _builder_without_tensorflow(name, where)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(
            f"there is no tfds data set {name}{hint}: for your own images set "
            "data.path to a folder that holds train/CLASS/IMAGE"
        ) from None
    except UserError:
        raise
    except Exception as error:
        # A missing version, an unreachable gs:// URL, damaged metadata, and more.
        reason = str(error).strip().splitlines() or ["unknown"]
        raise UserError(
            f"tfds data set {name} cannot be opened: {reason[0]}; expected NAME or "
            "NAME:VERSION, prepared below data.data_dir"
        ) from error


def _builder_without_tensorflow(name: str, where: str | None) -> Any:
    """``tfds.builder``, for data whose code needs TensorFlow too, such as coco."""
    import tensorflow_datasets as tfds

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it announces the failure
            return tfds.builder(name, data_dir=where)
    except ImportError:
        try:
            return tfds.core.read_only_builder.builder_from_files(name, data_dir=where)
        except tfds.core.DatasetNotFoundError:
            raise _unprepared(name, where or "~/tensorflow_datasets") from None


def prepared_builder(name: str, data_dir: str | None) -> Any:
    """The builder of a data set in ArrayRecord, which is prepared if necessary.

    Raises:
      UserError: there is no such data set, or it is stored in another way.
    """
    builder = find_builder(name, data_dir)
    if not builder.is_prepared():
        _prepare(builder, name)
        return builder
    stored_as = builder.info.file_format.value
    if stored_as == "tfrecord":
        where = "" if data_dir is None else f" --data-dir {shlex.quote(str(data_dir))}"
        raise UserError(
            f"tfds data set {name} in {builder.data_dir} is prepared as TFRecord, "
            f"which has no random access; run resnet-jax prepare tfds:{name} OUTPUT"
            f"{where} and set data.path=OUTPUT"
        )
    if stored_as != "array_record":
        raise UserError(
            f"tfds data set {name} in {builder.data_dir} is prepared as {stored_as}; "
            "prepare it as ArrayRecord in another data.data_dir (tfds build "
            "--file_format=array_record)"
        )
    return builder


def _prepare(builder: Any, name: str) -> None:
    import tensorflow_datasets as tfds

    from resnet_jax.data import digits

    is_ours = isinstance(builder, digits.Digits)
    if not is_ours and not _has_tensorflow():
        raise _unprepared(name, builder.data_dir)
    # For our digits, tfds would announce a download of unknown size.
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


def _unprepared(name: str, where: Any) -> UserError:
    return UserError(
        f"tfds data set {name} is not prepared in {where}: give its files with "
        f"data.path, or install what prepares it here: {how_to_install('tensorflow')}"
    )


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None
