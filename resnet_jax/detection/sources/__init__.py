"""Open annotated images as they are stored: VOC, COCO, prepared shards or tfds."""

import dataclasses
import hashlib
from collections.abc import Sequence

from etils import epath

from resnet_jax.config.detection import DetectionDataConfig
from resnet_jax.data.sources.records import MANIFEST, read_manifest
from resnet_jax.detection.annotations import Source, missing
from resnet_jax.detection.sources.coco import has_coco, open_coco
from resnet_jax.detection.sources.prepared import open_prepared
from resnet_jax.detection.sources.voc import has_voc, open_voc
from resnet_jax.errors import UserError
from resnet_jax.identity import Identity
from resnet_jax.prepare.dataset import PROGRESS
from resnet_jax.storage import is_remote, locate, reached


@dataclasses.dataclass(frozen=True)
class DetectionData:
    """The annotated images of a run.

    Attributes:
      train: images to train on.
      test: images for the reported precision, with the same classes.
      class_names: in the order of the classes.
      identity: what distinguishes the data from others, annotations included.
      notes: sentences for the start of a run, such as on boxes that were left out.
    """

    train: Source
    test: Source
    class_names: tuple[str, ...]
    identity: Identity
    notes: tuple[str, ...] = ()


def open_detection_data(data: DetectionDataConfig) -> DetectionData:
    """Opens the data of a config.

    Raises:
      UserError: they are missing, damaged or contradict the config.
    """
    given = f"tfds:{data.name}" if data.path is None else data.path
    kind = source_kind(given, data.format)

    def open_split(split: str, class_names: Sequence[str], label: str) -> Source:
        return open_source(
            given, split, kind, class_names, data_dir=data.data_dir, label=label
        )

    origin = "data.class_names" if data.class_names else f"split {data.train_split}"
    train = open_split(data.train_split, data.class_names, origin)
    test = open_split(data.test_split, train.class_names, origin)
    if train.category_ids != test.category_ids:
        raise UserError(
            f"{data.train_split} and {data.test_split} of {given} number their "
            "categories differently; give them the same ids"
        )
    if data.on_error == "stop":
        for split, source in ((data.train_split, train), (data.test_split, test)):
            _refuse_missing(source, split)
    version = hashlib.sha256(f"{checksum(train)} {checksum(test)}".encode())
    identity = Identity(
        kind=kind,
        version=f"sha256:{version.hexdigest()}",
        class_names=train.class_names,
        counts={"train": len(train), "test": len(test)},
    )
    notes = (*train.notes, *test.notes, *_shared(train, test))
    return DetectionData(train, test, train.class_names, identity, notes)


def _shared(train: Source, test: Source) -> tuple[str, ...]:
    """A note on the images that are in both splits, if any are."""
    seen = {train.name(index) for index in range(len(train))}
    count = sum(test.name(index) in seen for index in range(len(test)))
    if not count:
        return ()
    return (
        f"{count:,} of the {len(test):,} test images have the name of a training image",
    )


def _refuse_missing(source: Source, split: str) -> None:
    if names := missing(source):
        raise UserError(
            f"{len(names):,} of the {len(source):,} images of split {split} have no "
            f"file, the first {names[0]}; add them, or remove them from the split"
        )


def open_source(
    given: str,
    split: str,
    kind: str | None = None,
    class_names: Sequence[str] = (),
    data_dir: str | None = None,
    label: str = "the training split",
) -> Source:
    """The images of a split.

    Args:
      given: a folder, or ``tfds:NAME[:VERSION]``.
      split: see ``open_voc`` and the functions beside it.
      kind: "voc", "coco", "prepared" or "tfds"; None means by looking.
      class_names: the classes in their order; () takes them from the data.
      data_dir: where tfds data sets are prepared.
      label: what the given classes come from, for errors.

    Raises:
      UserError: the data are missing or damaged.
    """
    kind = source_kind(given, kind)
    if kind == "tfds":
        # tfds is slow to import, and reading other files does not need it.
        from resnet_jax.detection.sources.tfds import open_tfds_detection

        name = given.removeprefix("tfds:")
        return open_tfds_detection(name, data_dir, split, class_names)
    root = locate(given)
    if kind == "prepared":
        manifest = read_manifest(epath.Path(root))
        if manifest is None:
            raise UserError(f"data.path {root} holds no {MANIFEST}; prepare it first")
        return open_prepared(root, manifest, split, class_names)
    if kind == "coco":
        return open_coco(root, split, class_names)
    return open_voc(root, split, class_names, label)


def source_kind(given: str, kind: str | None) -> str:
    """How data are stored: "voc", "coco", "prepared" or "tfds"; ``kind`` if not None.

    A folder of shards is "prepared", whatever the layout before.

    Raises:
      UserError: the folder holds none of them, or more than one.
    """
    if given.startswith("tfds:"):
        if kind not in (None, "tfds"):
            raise UserError(
                f"data.format={kind} needs files: set data.path to a folder"
            )
        return "tfds"
    if kind == "tfds":
        raise UserError("data.format=tfds needs data.name, and no data.path")
    root = locate(given)
    with reached(root):
        if not root.is_dir():
            raise UserError(
                f"data.path {root} is not a folder; give one in VOC layout "
                "(Annotations, ImageSets, JPEGImages) or COCO layout "
                "(annotations/instances_SPLIT.json), or a prepared one"
            )
        if (root / MANIFEST).exists():
            return "prepared"
        if kind is not None:
            return kind
        if is_remote(given):
            raise UserError(
                f"data.path {root} has no {MANIFEST}; copy other data to a disk"
            )
        if (root / PROGRESS).exists():
            raise UserError(
                f"data.path {root} is only partly prepared; run the same command again"
            )
    found = [name for name, has in (("voc", has_voc), ("coco", has_coco)) if has(root)]
    if len(found) != 1:
        what = "both layouts" if found else "neither"
        raise UserError(
            f"data.path {root} holds {what}: expected Annotations/NAME.xml as in VOC, "
            "or annotations/instances_SPLIT.json as in COCO; set data.format to choose"
        )
    return found[0]


def checksum(source: Source) -> str:
    """SHA-256 of the names and annotations of a source, in order."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        found = source.annotation(index)
        header = f"{source.name(index)}\n{found.size} {len(found.boxes)}\n"
        digest.update(header.encode("utf-8", "surrogateescape"))
        for array in (found.boxes, found.classes, found.difficult, found.crowd):
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        digest.update(found.areas.astype("<f4").tobytes())
    return digest.hexdigest()
