"""Open annotated images as they are stored: VOC's and COCO's layouts."""

import dataclasses
import hashlib
from pathlib import Path

from resnet_jax.config.detection import DetectionDataConfig
from resnet_jax.detection.annotations import Source, missing
from resnet_jax.detection.sources.coco import has_coco, open_coco
from resnet_jax.detection.sources.voc import has_voc, open_voc
from resnet_jax.errors import UserError
from resnet_jax.identity import Identity
from resnet_jax.storage import expand


@dataclasses.dataclass(frozen=True)
class DetectionData:
    """The annotated images of a run.

    Attributes:
      train: images to train on.
      test: images for the reported precision, with the same classes.
      class_names: in the order of the classes.
      identity: what distinguishes the data from others, annotations included.
    """

    train: Source
    test: Source
    class_names: tuple[str, ...]
    identity: Identity


def open_detection_data(data: DetectionDataConfig) -> DetectionData:
    """Opens the data of a config.

    Raises:
      UserError: they are missing, damaged or contradict the config.
    """
    if data.path is None:
        raise UserError("data.path is not set; give a folder in VOC or COCO layout")
    root = expand(data.path)
    kind = _kind(root, data.format)
    if kind == "coco":
        train: Source = open_coco(root, data.train_split, data.class_names)
        test: Source = open_coco(root, data.test_split, train.class_names)
    else:
        origin = "data.class_names" if data.class_names else data.train_split
        train = open_voc(root, data.train_split, data.class_names, origin)
        test = open_voc(root, data.test_split, train.class_names, origin)
    if train.category_ids != test.category_ids:
        raise UserError(
            f"{data.train_split} and {data.test_split} of {root} number their "
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
    return DetectionData(train, test, train.class_names, identity)


def _refuse_missing(source: Source, split: str) -> None:
    if names := missing(source):
        raise UserError(
            f"{len(names):,} of the {len(source):,} images of split {split} have no "
            f"file, the first {names[0]}; add them, or remove them from the split"
        )


def _kind(root: Path, given: str | None) -> str:
    """Which layout a folder has: "voc" or "coco"."""
    if not root.is_dir():
        raise UserError(
            f"data.path {root} is not a folder; give one in VOC layout (Annotations, "
            "ImageSets, JPEGImages) or COCO layout (annotations/instances_SPLIT.json)"
        )
    if given is not None:
        return given
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
