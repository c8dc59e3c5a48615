"""Parts of splits: ``train[:90%]``, ``train[1000:2000]``, ``train[:10%]+test[-5%:]``.

Expressions and rounding follow tensorflow_datasets: percentages may be fractions,
negative bounds count from the end, and a percentage is rounded to the nearest example,
halves to even. So ``train[:90%]`` and ``train[90%:]`` share no example and leave none
out. Unlike tfds, empty or overlapping parts and bounds in two units are refused.
"""

import bisect
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

from resnet_jax.data.sources.base import Description, Example, Source
from resnet_jax.errors import UserError

_PART = re.compile(r"(?P<split>[\w.-]+)(\[(?P<low>[^:\[\]]*):(?P<high>[^:\[\]]*)\])?")
_BOUND = re.compile(r"-?\d+(\.\d+)?%|-?\d+")
_FORMS = "expected SPLIT, SPLIT[:90%], SPLIT[1000:2000] or such parts joined by +"


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples ``start`` up to ``stop`` of a base split."""

    split: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: "Part") -> bool:
        """Whether an example is in both."""
        return self.split == other.split and (
            max(self.start, other.start) < min(self.stop, other.stop)
        )


def split_names(expression: str) -> list[str]:
    """The base splits in an expression, in its order, each once.

    Raises:
      UserError: the expression cannot be read.
    """
    return list(dict.fromkeys(match["split"] for match in _matches(expression)))


def parse(expression: str, description: Description) -> tuple[Part, ...]:
    """The parts in an expression, in its order.

    Raises:
      UserError: the expression cannot be read, or names an unknown split, a part that
        is empty or beyond the end, or examples twice.
    """
    parts: list[Part] = []
    for match in _matches(expression):
        part = _part(match, expression, description)
        for other in parts:
            if part.overlaps(other):
                raise UserError(
                    f"split {expression!r} names examples of {part.split} twice; "
                    "give parts that do not overlap"
                )
        parts.append(part)
    return tuple(parts)


def _matches(expression: str) -> list[re.Match[str]]:
    matches = []
    for text in expression.split("+"):
        match = _PART.fullmatch(text.strip())
        if match is None:
            raise UserError(f"split {expression!r} cannot be read; {_FORMS}")
        matches.append(match)
    return matches


def _part(match: re.Match[str], expression: str, description: Description) -> Part:
    split, counts = match["split"], description.num_examples
    if split not in counts:
        raise UserError(
            f"{description.name} has no split {split!r}; its splits are "
            f"{', '.join(counts) or 'none'}"
        )
    total = counts[split]
    bounds = [(match[side] or "").strip() for side in ("low", "high")]
    given = [bound for bound in bounds if bound]
    if match["low"] is not None and not given:
        raise UserError(f"split {expression!r} has no bound in its brackets; {_FORMS}")
    for bound in given:
        if not _BOUND.fullmatch(bound):
            raise UserError(
                f"split {expression!r} has the bound {bound!r}; expected a number of "
                "examples such as 1000 or a percentage such as 90%"
            )
    if len({bound.endswith("%") for bound in given}) > 1:
        raise UserError(
            f"split {expression!r} mixes examples and percentages; give both bounds "
            "in one unit"
        )
    start, stop = (
        _position(bound, default, total, expression, split)
        for bound, default in zip(bounds, (0, total), strict=True)
    )
    if start >= stop:
        raise UserError(
            f"split {expression!r} is empty: {split} has {total} examples, and the "
            f"part goes from {start} up to {stop}"
        )
    return Part(split, start, stop)


def _position(bound: str, default: int, total: int, expression: str, split: str) -> int:
    if not bound:
        return default
    if bound.endswith("%"):
        # A product with 0.01 would round differently from tfds.
        position = round(float(bound[:-1]) * total / 100.0)
    else:
        position = int(bound)
    if abs(position) > total:
        raise UserError(
            f"split {expression!r} has the bound {bound}, which is beyond the {total} "
            f"examples of {split}"
        )
    return position + total if position < 0 else position


def refuse_overlap(description: Description, uses: Mapping[str, str]) -> None:
    """Raises UserError if two expressions share an example.

    Args:
      description: of the data set.
      uses: expressions by field, such as "data.train_split".
    """
    parsed = {use: parse(split, description) for use, split in uses.items()}
    for (first, ours), (second, others) in itertools.combinations(parsed.items(), 2):
        for part, other in itertools.product(ours, others):
            if part.overlaps(other):
                shared = min(part.stop, other.stop) - max(part.start, other.start)
                raise UserError(
                    f"{first}={uses[first]} and {second}={uses[second]} share "
                    f"{shared} examples of {part.split}; give parts that do not "
                    f"overlap, such as {part.split}[:90%] and {part.split}[90%:]"
                )


class Parts:
    """Parts of sources, one after another."""

    def __init__(self, sources: Sequence[Source], parts: Sequence[Part]):
        """``parts[i]`` is cut from ``sources[i]``; all have the same classes."""
        self._sources, self._parts = list(sources), list(parts)
        self._ends = list(itertools.accumulate(len(part) for part in parts))
        self.class_names = sources[0].class_names
        self.channels = sources[0].channels

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        place = bisect.bisect_right(self._ends, index)
        before = self._ends[place] - len(self._parts[place])
        return self._sources[place][self._parts[place].start + index - before]


class SplitCollection:
    """A ``Collection`` that opens base splits by ``_open`` and cuts parts from them."""

    description: Description

    def source(self, split: str) -> Source:
        """See ``Collection``."""
        parts = parse(split, self.description)
        sources = {part.split: self._open(part.split) for part in parts}
        if len(parts) == 1 and len(parts[0]) == len(sources[parts[0].split]):
            return sources[parts[0].split]
        return Parts([sources[part.split] for part in parts], parts)

    def _open(self, split: str) -> Source:
        raise NotImplementedError
