"""Lists of labels for images in a single folder, such as ImageNet's validation set."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from resnet_jax.data.sources import imagenet
from resnet_jax.errors import UserError

# The files that list labels, with a pattern and a description of their lines. Their
# first two groups are the image's file and its label.
_OWN = (
    "{split}.txt",
    re.compile(r"(.*\S)\s+(\S+)"),
    "FILE LABEL, such as ILSVRC2012_val_00000001.JPEG n01751748",
)
_TINY_IMAGENET = (
    "{split}/{split}_annotations.txt",
    re.compile(r"([^\t]*)\t([^\t]*).*"),
    "FILE, CLASS and a box, separated by tabs",
)
_KAGGLE = (
    "LOC_{split}_solution.csv",
    re.compile(r"([^,]*),\s*(\S+).*"),
    "IMAGE,CLASS and its boxes",
)
_KAGGLE_DEPTH = 3  # folders from ILSVRC/Data/CLS-LOC/val up to the list

_Entry = tuple[int, str, str]  # line number, file, label: a class name or a number


def has_annotations(root: Path, split: str) -> bool:
    """Whether a split's folder has Tiny-ImageNet's list, and so no class folders."""
    return (root / _TINY_IMAGENET[0].format(split=split)).is_file()


def listed_labels(
    root: Path, split: str, files: Sequence[str], class_names: Sequence[str], where: str
) -> np.ndarray:
    """The labels, int32 (n,), of a split's images in one folder or archive.

    The list is the first of ``root/SPLIT.txt`` with lines ``FILE LABEL``;
    Tiny-ImageNet's ``val_annotations.txt`` in the folder; Kaggle's
    ``LOC_val_solution.csv`` beside the folder or where Kaggle's archive has it; and,
    for ImageNet's validation images, the list in tensorflow_datasets.

    Args:
      root: the folder of the splits.
      split: the split's name.
      files: the images' names without folders.
      class_names: in the order of the labels.
      where: the images' folder or archive, for errors.

    Raises:
      UserError: there is no list, a line is malformed, list and files do not match, or
        a label is not a class.
    """
    path, entries = _find_list(root, split, files, where)
    label_of = {name: label for label, name in enumerate(class_names)}
    place_of = {name: place for place, name in enumerate(files)}
    # Kaggle's list names images without a suffix.
    place_of |= {PurePosixPath(name).stem: p for p, name in enumerate(files)}
    labels = np.full(len(files), -1, np.int32)
    line_of: dict[int, int] = {}
    for line, file, text in entries:
        place = place_of.get(PurePosixPath(file).name)
        if place is None:
            raise UserError(
                f"{path}, line {line} names {file}, which {where} lacks: it holds "
                f"{len(files)} images, and the list names {len(entries)}; complete one "
                "of them"
            )
        if place in line_of:
            raise UserError(
                f"{path}, line {line} names {file} again, after line {line_of[place]}; "
                "remove one of the lines"
            )
        number = int(text) if text.isascii() and text.isdecimal() else -1
        label = label_of.get(text, number)
        if not 0 <= label < len(class_names):
            raise UserError(
                f"{path}, line {line} has the label {text}, which is neither a class "
                f"of the training split nor a number from 0 to {len(class_names) - 1}"
            )
        line_of[place], labels[place] = line, label
    if len(line_of) < len(files):
        raise UserError(
            f"{where} holds {files[int(np.argmin(labels))]}, which {path} does not "
            f"name: there are {len(files)} images, and the list names {len(entries)}"
        )
    return labels


def _find_list(
    root: Path, split: str, files: Sequence[str], where: str
) -> tuple[Path, list[_Entry]]:
    """The path and the entries of the list; see ``listed_labels``."""
    above = root.absolute().parents[:_KAGGLE_DEPTH]
    candidates = [(root, _OWN), (root, _TINY_IMAGENET)]
    candidates += [(folder, _KAGGLE) for folder in (root, *above)]
    for folder, (name, pattern, expected) in candidates:
        path = folder / name.format(split=split)
        if path.is_file():
            entries = _read(path, pattern, expected)
            return path, entries[1:] if name == _KAGGLE[0] else entries  # a header
    if files[0].startswith(imagenet.VALIDATION_NAME[:15]):
        path = imagenet.validation_list()
        lines = enumerate(path.read_text().split(), 1)
        return path, [
            (i, imagenet.VALIDATION_NAME.format(i), wnid) for i, wnid in lines
        ]
    own = root / _OWN[0].format(split=split)
    raise UserError(
        f"{where} holds images and no class folders; expected {where}/CLASS/IMAGE, or "
        f"a list {own} with a line FILE LABEL for each image"
    )


def _read(path: Path, pattern: re.Pattern[str], expected: str) -> list[_Entry]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list {path} cannot be read: {error}") from error
    entries = []
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        match = pattern.fullmatch(line)
        if match:
            entries.append((number, match[1], match[2]))
        elif line:
            raise UserError(f"{path}, line {number} is {line!r}; expected {expected}")
    return entries
