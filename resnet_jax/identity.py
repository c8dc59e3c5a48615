"""Which data a run was trained on, so that other data are noticed."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Identity:
    """What distinguishes one data set from another, wherever it is stored.

    Attributes:
      kind: of storage, such as "tfds" or "class folders".
      version: of a tfds data set, or a checksum: of a prepared one's shards, or of
        the annotations for detection.
      class_names: in the order of the labels.
      counts: examples by the run's split: train, test and perhaps holdout.
    """

    kind: str
    version: str | None
    class_names: tuple[str, ...]
    counts: Mapping[str, int]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Identity":
        """The identity whose ``dataclasses.asdict`` was saved as JSON."""
        names = tuple(content["class_names"])
        return cls(content["kind"], content["version"], names, content["counts"])

    def difference(self, other: "Identity") -> str | None:
        """The first thing that differs in ``other``, in a few words; None if none."""
        return next(self._differences(other), None)

    def class_difference(self, other: "Identity") -> str | None:
        """The first difference between the classes, in a few words; None if none."""
        if self.class_names == other.class_names:
            return None
        return _first_difference(self.class_names, other.class_names)

    def _differences(self, other: "Identity") -> Iterator[str]:
        if classes := self.class_difference(other):
            yield classes
        for split, count in self.counts.items():
            found = other.counts.get(split)
            if found != count:
                yield f"the {split} split has {found or 'no'} examples, not {count}"
        if self.kind != other.kind:
            yield f"they are stored as {other.kind}, not as {self.kind}"
        if self.version != other.version:
            yield f"their version is {other.version}, not {self.version}"


def _first_difference(names: Sequence[str], others: Sequence[str]) -> str:
    """How two different lists of classes differ first."""
    missing, new = set(names) - set(others), set(others) - set(names)
    if missing and new:
        return f"the class {min(missing)!r} is missing and {min(new)!r} is new"
    if missing or new:
        what = f"{min(missing or new)!r} is {'missing' if missing else 'new'}"
        return f"there are {len(others)} classes, not {len(names)}: {what}"
    pairs = enumerate(zip(names, others, strict=True))
    label, (name, found) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    return f"class {label} is {found!r}, not {name!r}"
