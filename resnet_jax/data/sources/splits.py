"""Parts of splits: ``train[:90%]``, ``train[1000:2000]``, ``train[:10%]+test[-5%:]``.

Expressions and rounding follow tensorflow_datasets: a percentage may be a fraction, a
negative bound counts from the end, and bounds round to the nearest example, halves to
even. So ``train[:90%]`` and ``train[90%:]`` together hold each example once. Unlike
tfds, empty or overlapping parts and bounds in two units are refused.
"""

import bisect
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence

from resnet_jax.data.sources.base import Description, Example, Source, notes
from resnet_jax.errors import UserError, some_of

_BOUND = r"-?\d+(?:\.\d+)?%|-?\d+"
_PART = re.compile(
    r"(?P<split>[\w.-]+)"
    rf"(\[(?!\s*:\s*\])\s*(?P<low>{_BOUND})?\s*:\s*(?P<high>{_BOUND})?\s*\])?"
)


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples ``start`` up to ``stop`` of a base split."""

    split: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def shared(self, other: "Part") -> int:
        """Number of examples in both parts."""
        if self.split != other.split:
            return 0
        return max(0, min(self.stop, other.stop) - max(self.start, other.start))


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
        if any(part.shared(other) for other in parts):
            raise UserError(
                f"split {expression!r} names examples of {part.split} twice; give "
                "parts that do not overlap"
            )
        parts.append(part)
    return tuple(parts)


def _matches(expression: str) -> list[re.Match[str]]:
    matches = [_PART.fullmatch(text.strip()) for text in expression.split("+")]
    if None in matches:
        raise UserError(
            f"split {expression!r} cannot be read; expected SPLIT, SPLIT[:90%], "
            "SPLIT[1000:2000] or such parts joined by +"
        )
    return [match for match in matches if match]


def _part(match: re.Match[str], expression: str, description: Description) -> Part:
    split, low, high = match.group("split", "low", "high")
    if split not in description.num_examples:
        raise UserError(
            f"{description.name} has no split {split!r}; its splits are "
            f"{some_of(description.splits) or 'none'}"
        )
    if low and high and low.endswith("%") != high.endswith("%"):
        raise UserError(
            f"split {expression!r} mixes examples and percentages; give both bounds "
            "in one unit"
        )
    total = description.num_examples[split]
    start = _position(low, total, expression, split) if low else 0
    stop = _position(high, total, expression, split) if high else total
    if start >= stop:
        raise UserError(
            f"split {expression!r} is empty: {split} has {total} examples, and the "
            f"part goes from {start} up to {stop}"
        )
    return Part(split, start, stop)


def _position(bound: str, total: int, expression: str, split: str) -> int:
    if bound.endswith("%"):
        # A product with 0.01 would round differently from tfds.
        position = round(float(bound[:-1]) * total / 100.0)
    else:
        position = int(bound)
    if abs(position) > total:
        raise UserError(
            f"split {expression!r} has the bound {bound}, but {split} has only {total} "
            "examples"
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
            if shared := part.shared(other):
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
        every = (note for source in sources for note in notes(source))
        self.notes = tuple(dict.fromkeys(every))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        place = bisect.bisect_right(self._ends, index)
        before = self._ends[place] - len(self._parts[place])
        return self._sources[place][self._parts[place].start + index - before]


@dataclasses.dataclass(frozen=True)
class Collection:
    """The splits of a data set.

    Attributes:
      description: of the data set.
      open_split: returns the source of a base split.
    """

    description: Description
    open_split: Callable[[str], Source]

    def source(self, split: str) -> Source:
        """A split, or parts such as ``train[:90%]``.

        Raises:
          UserError: there is no such split or part, or it cannot be read.
        """
        parts = parse(split, self.description)
        sources = {part.split: self.open_split(part.split) for part in parts}
        if len(parts) == 1 and len(parts[0]) == len(sources[parts[0].split]):
            return sources[parts[0].split]
        return Parts([sources[part.split] for part in parts], parts)
