"""Lists of labels for images in a single folder, such as ImageNet's validation set."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from resnet_jax.data.sources import imagenet
from resnet_jax.data.sources.base import read_text
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
    return (root / _TINY_IMAGENET[0].format(split=split)).exists()


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
      UserError: there is no list, a line is malformed, list and files do not match, a
        label is not a class, or some labels are names and others numbers.
    """
    path, entries = _find_list(root, split, files, where)
    # Kaggle's list names images without a suffix.
    place_of = {PurePosixPath(name).stem: place for place, name in enumerate(files)}
    place_of |= {name: place for place, name in enumerate(files)}
    labels = np.full(len(files), -1, np.int32)
    line_of: dict[int, int] = {}
    read = _labels_of(path, entries, class_names)
    for (line, file, _), label in zip(entries, read, strict=True):
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
        line_of[place], labels[place] = line, label
    if len(line_of) < len(files):
        raise UserError(
            f"{where} holds {files[int(np.argmin(labels))]}, which {path} does not "
            f"name: there are {len(files)} images, and the list names {len(entries)}"
        )
    return labels


def _labels_of(
    path: Path, entries: Sequence[_Entry], class_names: Sequence[str]
) -> list[int]:
    """The labels of a list: all of them names of classes, or all of them numbers.

    If both are possible, as with classes named by numbers, they are names.
    """
    by_name = {name: label for label, name in enumerate(class_names)}
    by_number = {str(label): label for label in range(len(class_names))}
    named = [by_name.get(text) for *_, text in entries]
    numbered = [by_number.get(text.lstrip("0") or "0") for *_, text in entries]
    for (line, _, text), *readings in zip(entries, named, numbered, strict=True):
        if readings == [None, None]:
            raise UserError(
                f"{path}, line {line} has the label {text}, which is neither a class "
                f"of the training split nor a number from 0 to {len(class_names) - 1}"
            )
    for found in (named, numbered):
        labels = [label for label in found if label is not None]
        if len(labels) == len(found):
            return labels
    number, name = (entries[found.index(None)] for found in (named, numbered))
    raise UserError(
        f"{path} mixes numbers and names: the label {number[2]} in line {number[0]} is "
        f"the name of no class, and {name[2]} in line {name[0]} is no number from 0 to "
        f"{len(class_names) - 1}; give the names in all lines"
    )


def _find_list(
    root: Path, split: str, files: Sequence[str], where: str
) -> tuple[Path, list[_Entry]]:
    """The path and the entries of the list; see ``listed_labels``."""
    above = root.absolute().parents[:_KAGGLE_DEPTH]
    candidates = [(root, _OWN), (root, _TINY_IMAGENET)]
    candidates += [(folder, _KAGGLE) for folder in (root, *above)]
    for folder, (name, pattern, expected) in candidates:
        path = folder / name.format(split=split)
        if path.exists() and not path.is_dir():
            entries = _read(path, pattern, expected)
            return path, entries[1:] if name == _KAGGLE[0] else entries  # a header
    if files[0].startswith(imagenet.VALIDATION_NAME[:15]):
        path = imagenet.validation_list()
        lines = enumerate(read_text(path).split(), 1)
        return path, [
            (i, imagenet.VALIDATION_NAME.format(i), wnid) for i, wnid in lines
        ]
    own = root / _OWN[0].format(split=split)
    raise UserError(
        f"{where} holds images and no class folders; expected {where}/CLASS/IMAGE, or "
        f"a list {own} with a line FILE LABEL for each image"
    )


def _read(path: Path, pattern: re.Pattern[str], expected: str) -> list[_Entry]:
    entries = []
    for number, line in enumerate(map(str.strip, read_text(path).splitlines()), 1):
        match = pattern.fullmatch(line)
        if match:
            entries.append((number, match[1], match[2]))
        elif line:
            raise UserError(f"{path}, line {number} is {line!r}; expected {expected}")
    return entries
