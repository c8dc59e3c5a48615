"""Lists of labels for images in a single folder, such as ImageNet's validation set."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from resnet_jax.data.sources import imagenet
from resnet_jax.errors import UserError

_KAGGLE = "LOC_{split}_solution.csv"
_TINY_IMAGENET = "{split}/{split}_annotations.txt"
_KAGGLE_DEPTH = 3  # folders from ILSVRC/Data/CLS-LOC/val up to the list


@dataclasses.dataclass(frozen=True)
class LabelList:
    """A list of files and labels.

    Attributes:
      path: the list's file, for errors.
      entries: (line number, file, label); a label is a class name or a number.
    """

    path: Path
    entries: list[tuple[int, str, str]]

    def labels(
        self, files: Sequence[str], class_names: Sequence[str], where: str
    ) -> np.ndarray:
        """The label of each file, int32.

        Args:
          files: names without folders.
          class_names: in the order of the labels.
          where: the files' folder or archive, for errors.

        Raises:
          UserError: list and files do not match, or a label is not a class.
        """
        label_of = {name: label for label, name in enumerate(class_names)}
        place_of = {name: place for place, name in enumerate(files)}
        # Kaggle's list names images without a suffix.
        place_of |= {PurePosixPath(name).stem: p for p, name in enumerate(files)}
        labels = np.full(len(files), -1, np.int32)
        line_of: dict[int, int] = {}
        for line, file, text in self.entries:
            place = place_of.get(PurePosixPath(file).name)
            if place is None:
                raise UserError(
                    f"{self.path}, line {line} names {file}, which {where} lacks: it "
                    f"holds {len(files)} images, and the list names "
                    f"{len(self.entries)}; complete one of them"
                )
            if place in line_of:
                raise UserError(
                    f"{self.path}, line {line} names {file} again, after line "
                    f"{line_of[place]}; remove one of the lines"
                )
            line_of[place] = line
            labels[place] = self._label(text, line, label_of)
        if len(line_of) < len(files):
            missing = files[int(np.argmin(labels))]
            raise UserError(
                f"{where} holds {missing}, which {self.path} does not name: there are "
                f"{len(files)} images, and the list names {len(self.entries)}"
            )
        return labels

    def _label(self, text: str, line: int, label_of: dict[str, int]) -> int:
        if text in label_of:
            return label_of[text]
        if text.isascii() and text.isdecimal() and int(text) < len(label_of):
            return int(text)
        raise UserError(
            f"{self.path}, line {line} has the label {text}, which is neither a class "
            f"of the training split nor a number from 0 to {len(label_of) - 1}"
        )


def has_annotations(root: Path, split: str) -> bool:
    """Whether a split's folder has Tiny-ImageNet's list, and so no class folders."""
    return (root / _TINY_IMAGENET.format(split=split)).is_file()


def find_list(root: Path, split: str, files: Sequence[str], where: str) -> LabelList:
    """Finds the list for images of a split in one folder or archive.

    It is the first of ``root/SPLIT.txt`` with lines ``FILE LABEL``; Tiny-ImageNet's
    ``val_annotations.txt`` in the folder; Kaggle's ``LOC_val_solution.csv`` beside the
    folder or where Kaggle's archive has it; and, for ImageNet's validation images, the
    list in tensorflow_datasets.

    Raises:
      UserError: there is no list, or a line is malformed.
    """
    own = root / f"{split}.txt"
    if own.is_file():
        return _read_own(own)
    if has_annotations(root, split):
        return _read_tiny_imagenet(root / _TINY_IMAGENET.format(split=split))
    for folder in (root, *root.absolute().parents[:_KAGGLE_DEPTH]):
        solution = folder / _KAGGLE.format(split=split)
        if solution.is_file():
            return _read_kaggle(solution)
    if files[0].startswith(imagenet.VALIDATION_NAME[:15]):
        path = imagenet.validation_list()
        wnids = path.read_text().split()
        names = map(imagenet.VALIDATION_NAME.format, range(1, len(wnids) + 1))
        return LabelList(path, list(zip(range(1, 10**6), names, wnids, strict=False)))
    raise UserError(
        f"{where} holds images and no class folders; expected {where}/CLASS/IMAGE, or "
        f"a list {own} with a line FILE LABEL for each image"
    )


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list {path} cannot be read: {error}") from error
    return [
        (number, line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]


def _read_own(path: Path) -> LabelList:
    entries = []
    for number, line in _lines(path):
        columns = line.rsplit(maxsplit=1)  # a file's name may have spaces
        if len(columns) != 2:
            raise UserError(
                f"{path}, line {number} is {line!r}; expected FILE LABEL, such as "
                "ILSVRC2012_val_00000001.JPEG n01751748"
            )
        entries.append((number, columns[0], columns[1]))
    return LabelList(path, entries)


def _read_tiny_imagenet(path: Path) -> LabelList:
    entries = []
    for number, line in _lines(path):
        columns = line.split("\t")  # file, class, and the box of the object
        if len(columns) < 2:
            raise UserError(
                f"{path}, line {number} is {line!r}; expected FILE, CLASS and a box, "
                "with tabs between"
            )
        entries.append((number, columns[0], columns[1]))
    return LabelList(path, entries)


def _read_kaggle(path: Path) -> LabelList:
    entries = []
    for number, line in _lines(path)[1:]:
        file, _, boxes = line.partition(",")
        if not boxes.split():
            raise UserError(
                f"{path}, line {number} is {line!r}; expected IMAGE,CLASS and its boxes"
            )
        # The same class comes before each of the boxes.
        entries.append((number, file, boxes.split()[0]))
    return LabelList(path, entries)
