"""Labels of a data set as classes of a net: by name, by number or by a given map."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data.sources.base import read_text
from resnet_jax.data.sources.imagenet import readable_names
from resnet_jax.errors import UserError, nearest
from resnet_jax.evaluation.nets import TrainedNet

_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.")


@dataclasses.dataclass(frozen=True)
class Matched:
    """How the nets answer about a data set.

    Attributes:
      class_names: of the answers.
      columns: of each net, its logits in the order of ``class_names``; None keeps them
        as they are.
      targets: int32, the answer that is right for each label of the data.
      note: a sentence if not all classes of the nets are among the answers.
    """

    class_names: tuple[str, ...]
    columns: tuple[tuple[int, ...] | None, ...]
    targets: np.ndarray
    note: str | None = None


def match_classes(
    nets: Sequence[TrainedNet],
    data_classes: Sequence[str],
    class_map: Mapping[str, str | int] | None = None,
    all_classes: bool = False,
) -> Matched:
    """Matches the classes of a data set with the nets' classes.

    Names are compared, also as readable ImageNet names; folders 0, 1, 2, ... are
    numbers of classes. If the data have only some of the classes, as ImageNet-A and -R
    have 200, the nets choose among these alone.

    Args:
      nets: with the same classes, perhaps in different orders. A net without names
        has the order of the data's classes.
      data_classes: names by label.
      class_map: the net's class, by name or number, for each name in the data.
      all_classes: let the nets choose among all of their classes.

    Raises:
      UserError: a class is unknown to a net, or a net has no classifier.
    """
    for net in nets:
        if net.num_classes is None:
            raise UserError(f"{net.source} has no classifier: give a net with classes")
    first = next((net for net in nets if net.class_names is not None), nets[0])
    names = first.class_names or tuple(map(str, range(first.num_classes)))
    found = _found(first, names, data_classes, class_map)
    orders = [
        _order(net, first, names)
        if net.class_names is not None or first.class_names is None
        else _order_by_data(net, first, found, data_classes, class_map)
        for net in nets
    ]
    kept = np.unique(found)
    if all_classes or len(kept) == first.num_classes:
        return Matched(names, tuple(orders), found.astype(np.int32))
    columns = [
        tuple(int(k if order is None else order[k]) for k in kept) for order in orders
    ]
    targets = np.searchsorted(kept, found).astype(np.int32)
    note = (
        f"the data have {len(kept)} of the net's {first.num_classes} classes, and the "
        "net chooses among these"
    )
    return Matched(tuple(names[k] for k in kept), tuple(columns), targets, note)


def _found(
    net: TrainedNet,
    names: Sequence[str],
    data_classes: Sequence[str],
    class_map: Mapping[str, str | int] | None,
) -> np.ndarray:
    """The number of the net's class for each class of the data."""
    by_name = {name: number for number, name in enumerate(names)}
    by_number = {str(number): number for number in range(net.num_classes)}
    if class_map is not None:
        ours = [class_map.get(name) for name in data_classes]
        if None in ours:
            name = data_classes[ours.index(None)]
            raise UserError(f"the class map lacks the class {name!r} of the data")
        return np.array([_known(net, by_name | by_number, str(name)) for name in ours])
    readable = dict(zip(readable_names(names), range(len(names)), strict=True))
    for known in (by_name, readable, by_number):
        if all(name in known for name in data_classes):
            return np.array([known[name] for name in data_classes])
    if net.class_names is None and len(data_classes) == net.num_classes:
        return np.arange(net.num_classes)
    return np.array([_known(net, by_name, name) for name in data_classes])


def _known(net: TrainedNet, numbers: Mapping[str, int], name: str) -> int:
    if name not in numbers:
        raise UserError(
            f"{net.source} has no class {name!r}: {nearest(name, list(numbers)[:1000])}"
            if net.class_names
            else f"{net.source} has {net.num_classes} classes without names, and the "
            f"data have the class {name!r}: give --class-map"
        )
    return numbers[name]


def _order(
    net: TrainedNet, first: TrainedNet, names: Sequence[str]
) -> tuple[int, ...] | None:
    """The net's logits in the order of the first net's classes."""
    _refuse_other_number(net, first)
    if net.class_names is None or net.class_names == tuple(names):
        return None
    own = {name: number for number, name in enumerate(net.class_names)}
    return tuple(_known(net, own, name) for name in names)


def _order_by_data(
    net: TrainedNet,
    first: TrainedNet,
    found: np.ndarray,
    data_classes: Sequence[str],
    class_map: Mapping[str, str | int] | None,
) -> tuple[int, ...] | None:
    """The logits of a net without names in the order of the first net's classes.

    Its own class for each class of the data is what it would be for the net alone.
    """
    _refuse_other_number(net, first)
    numbers = tuple(map(str, range(net.num_classes)))
    own = _found(net, numbers, data_classes, class_map)
    if np.array_equal(own, found):
        return None
    if len(np.unique(found)) < net.num_classes:
        raise UserError(
            f"{net.source} does not name its classes, and the data do not have all of "
            f"them: their order cannot be compared with that of {first.source}"
        )
    order = dict(zip(found.tolist(), own.tolist(), strict=True))
    return tuple(order[number] for number in range(net.num_classes))


def _refuse_other_number(net: TrainedNet, first: TrainedNet) -> None:
    if net.num_classes != first.num_classes:
        raise UserError(
            f"{net.source} has {net.num_classes} classes and {first.source} "
            f"{first.num_classes}: give nets with the same classes"
        )


def read_class_map(path: Path) -> dict[str, str | int]:
    """Reads the net's class for each class of the data.

    Args:
      path: a JSON object, or a line ``DATA NET`` for each class.

    Raises:
      UserError: it cannot be read.
    """
    text = read_text(path)
    if text.lstrip().startswith("{"):
        content = _json(path, text)
        if all(isinstance(value, (str, int)) for value in content.values()):
            return content
        raise UserError(f"{path} must give a name or a number for each class")
    pairs: dict[str, str | int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if words and len(words) != 2:
            raise UserError(
                f"{path}, line {number} is {line!r:.80}; expected the data's class and "
                "the net's"
            )
        if words:
            pairs[words[0]] = words[1]
    return pairs


def read_label_sets(path: Path, num_classes: int) -> list[tuple[int, ...]]:
    """Reads several right classes for each ImageNet validation image, or none (ReaL).

    Args:
      path: a JSON list of lists of class numbers; item i is image i + 1.
      num_classes: of the net.

    Raises:
      UserError: it cannot be read.
    """
    content = _json(path, read_text(path))
    if not isinstance(content, list):
        raise UserError(f"{path} is not a list of lists of class numbers")
    for number, item in enumerate(content):
        if not isinstance(item, list) or not all(
            type(label) is int and 0 <= label < num_classes for label in item
        ):
            raise UserError(
                f"{path}, item {number} is {item!r:.80}; expected a list of class "
                f"numbers from 0 to {num_classes - 1}"
            )
    return [tuple(item) for item in content]


def validation_number(name: str) -> int:
    """The number of an ImageNet validation image, from 1, by its file's name.

    Raises:
      UserError: it is another file.
    """
    match = _VALIDATION_NUMBER.search(name)
    if match is None:
        raise UserError(
            f"{name} is not an ImageNet validation image (ILSVRC2012_val_00000001."
            "JPEG): the labels cannot be assigned"
        )
    return int(match[1])


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
