"""ImageNet's thousand classes and the labels of its validation images.

The classes are WordNet synsets. Labels 0 to 999 follow the order of their identifiers
(wnids), as in torchvision, tensorflow_datasets and most released weights. The
challenge's development kit numbers them differently.
"""

import functools
import importlib.resources
import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from resnet_jax.errors import UserError

VALIDATION_NAME = "ILSVRC2012_val_{:08d}.JPEG"  # 1 to 50,000


@functools.cache
def _table() -> dict[str, tuple[str, ...]]:
    """Names by identifier, in the order of the labels."""
    file = importlib.resources.files("resnet_jax.data") / "imagenet_classes.txt"
    lines = file.read_text("utf-8").splitlines()
    rows = (line.split("\t") for line in lines)
    return {wnid: tuple(names.split(", ")) for wnid, names in rows}


def class_ids() -> tuple[str, ...]:
    """The identifiers of the 1,000 classes in the order of the labels."""
    return tuple(_table())


def readable_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Readable names, such as "golden retriever" for n02099601.

    WordNet's first name, or all of them if two classes share the first. A class that
    is not in ImageNet keeps its name.
    """
    count = Counter(names[0] for names in _table().values())
    found = [_table().get(name, (name,)) for name in class_names]
    return tuple(
        ", ".join(names) if count[names[0]] > 1 else names[0] for names in found
    )


def validation_list() -> Path:
    """The list in tensorflow_datasets: line i is the class of image i.

    Raises:
      UserError: this version of tensorflow_datasets has no such list.
    """
    # Importing tensorflow_datasets would take a second.
    spec = importlib.util.find_spec("tensorflow_datasets")
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder, "datasets", "imagenet2012", "validation_labels.txt")
        if file.is_file():
            return file
    raise UserError(
        "tensorflow_datasets has no list of ImageNet's validation labels; put one "
        "beside the images (see docs/data.md)"
    )
