"""Launches and memory traffic of a compiled program, read from XLA's optimised HLO.

XLA's cost analysis gives one sum for a program. Here each operation that the device
launches counts on its own: the bytes of its operands and results in the device's main
memory. A fusion is one operation. ``program.py`` is the command.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_SIZES = {"pred": 8, "token": 0, "opaque": 0}
"""Bits of the types whose names do not end with their size."""

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_FREE |= {"after-all", "partition-id", "replica-id"}
"""Instructions that move nothing."""

_MOVES = {"bitcast", "broadcast", "concatenate", "constant", "convert", "copy"}
_MOVES |= {"iota", "pad", "parameter", "reshape", "slice", "transpose", "tuple"}
"""A fusion of these alone computes nothing."""

_COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "collective-permute"}
_SLICES = {"slice", "dynamic-slice"}

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\](\{[^}]*\})?")
_ON_CHIP = "S(1)"
"""In the layout of an array that a TPU keeps outside of its main memory."""

_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      name: of the result.
      nbytes: size of the result.
      opcode: such as "fusion".
      operands: names.
      attributes: the rest of the line; of a parameter its number.
    """

    name: str
    nbytes: int
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclasses.dataclass(frozen=True)
class Operation:
    """One launch on the device.

    Attributes:
      kind: convolution, product, pooling, reduction, collective, elementwise, copy or
        other.
      name: of the instruction.
      nbytes: of its operands and results, of one launch.
      times: launches, by the loops around it.
    """

    kind: str
    name: str
    nbytes: int
    times: int = 1


Computations = dict[str, dict[str, Instruction]]
"""Instructions by name, by computation; the entry computation is ""."""


def read(text: str) -> Computations:
    """The computations of a module as ``compiled.as_text()`` prints it."""
    computations: Computations = {}
    inside: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if line.startswith("}"):
            inside = None
        elif inside is None and line.endswith("{"):
            head = line.split()
            name = "" if head[0] == "ENTRY" else head[0].lstrip("%")
            inside = computations[name] = {}
        elif inside is not None and " = " in line:
            instruction = _instruction(_COMMENT.sub("", line))
            inside[instruction.name] = instruction
    return computations


def operations(computations: Computations, name: str = "") -> Iterator[Operation]:
    """The operations of a computation, in order.

    A loop without a known trip count counts once. Of a conditional only the operands
    count.
    """
    inside = computations[name]
    for instruction in inside.values():
        if instruction.opcode in ("while", "call"):
            trips = _TRIPS.search(instruction.attributes)
            for called in _CALLED.findall(instruction.attributes):
                for operation in operations(computations, called):
                    times = operation.times * (int(trips[1]) if trips else 1)
                    yield dataclasses.replace(operation, times=times)
        elif instruction.opcode not in _FREE and not instruction.opcode.endswith(
            "-done"
        ):
            nbytes = instruction.nbytes
            if not instruction.opcode.endswith("-start"):  # whose results hold operands
                nbytes += _read(computations, inside, instruction)
            kind = _kind(list(_parts(computations, instruction)))
            yield Operation(kind, instruction.name, nbytes)


def by_kind(found: Iterable[Operation]) -> dict[str, tuple[int, int]]:
    """The launches of each kind, and their bytes."""
    kinds: dict[str, tuple[int, int]] = {}
    for operation in found:
        count, nbytes = kinds.get(operation.kind, (0, 0))
        count, nbytes = (
            count + operation.times,
            nbytes + operation.times * operation.nbytes,
        )
        kinds[operation.kind] = count, nbytes
    return kinds


def attributed(
    launches: Iterable[tuple[str, str, float]],
    operations: Iterable[Operation],
    steps: int,
) -> list[dict[str, Any]]:
    """Count, microseconds and bytes per step of each operation, the longest first.

    Inside a CUDA graph the trace names the graph instead of the operation. Then the
    kernel's name tells the fusion; equal fusions share a kernel, and their bytes are
    equal too.

    Args:
      launches: operation, kernel and microseconds of each.
      operations: of the program.
      steps: that the launches made.
    """
    known = {_plain(operation.name): operation for operation in operations}
    rows: dict[str, dict[str, Any]] = {}
    for name, kernel, microseconds in launches:
        in_graph = _plain(name) not in known
        key = _plain(kernel) if in_graph else _plain(name)
        operation = known.get(key)
        if key not in rows:
            rows[key] = {
                "operation": key,
                "kind": operation.kind if operation else "unknown",
                "count": 0.0,
                "microseconds": 0.0,
                "bytes": operation.nbytes if operation and not in_graph else 0.0,
            }
        rows[key]["count"] += 1 / steps
        rows[key]["microseconds"] += microseconds / steps
        if operation and in_graph:
            rows[key]["bytes"] += operation.nbytes / steps
    return sorted(rows.values(), key=lambda row: -row["microseconds"])


def sums_by_kind(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The sums over the operations of each kind, and their GB/s."""
    kinds: dict[str, dict[str, float]] = {}
    for row in rows:
        sums = kinds.setdefault(row["kind"], {})
        for field in ("count", "microseconds", "bytes"):
            sums[field] = sums.get(field, 0.0) + row[field]
    for sums in kinds.values():
        sums["gigabytes_per_second"] = sums["bytes"] / sums["microseconds"] / 1000
    return kinds


def _read(
    computations: Computations,
    inside: dict[str, Instruction],
    instruction: Instruction,
) -> int:
    """The bytes of the operands; of one that a fusion only slices, of the slices."""
    operands = dict.fromkeys(name for name in instruction.operands if name in inside)
    sizes = {name: inside[name].nbytes for name in operands}
    if instruction.opcode == "fusion":
        for called in _CALLED.findall(instruction.attributes):
            parts = computations[called]
            for part in parts.values():
                if part.opcode == "parameter":
                    name = instruction.operands[int(part.attributes)]
                    if name in sizes:
                        sizes[name] = min(sizes[name], _taken(parts, part))
    return sum(sizes.values())


def _taken(parts: dict[str, Instruction], array: Instruction) -> int:
    """The bytes of an array that a fusion's instructions take."""
    total = 0
    for user in parts.values():
        if array.name in user.operands:
            if user.opcode in _SLICES:
                total += user.nbytes
            elif user.opcode == "bitcast":
                total += _taken(parts, user)
            else:
                return array.nbytes
    return total or array.nbytes


def _plain(name: str) -> str:
    """A name as both HLO and kernels may write it."""
    return re.sub(r"[.\-]", "_", name.lstrip("%"))


def _parts(computations: Computations, whole: Instruction) -> Iterator[Instruction]:
    """The instruction, or the instructions that it fuses."""
    if whole.opcode != "fusion":
        yield whole
        return
    for called in _CALLED.findall(whole.attributes):
        for part in computations[called].values():
            yield from _parts(computations, part)


def _kind(parts: Sequence[Instruction]) -> str:
    opcodes = {part.opcode.removesuffix("-start") for part in parts}
    calls = " ".join(p.attributes for p in parts if p.opcode == "custom-call")
    if "convolution" in opcodes or "dim_labels=" in calls:
        return "convolution"
    if "dot" in opcodes or "lhs_contracting_dimensions" in calls:
        return "product"
    if opcodes & {"reduce-window", "select-and-scatter"}:
        return "pooling"
    if "reduce" in opcodes:
        return "reduction"
    if opcodes & _COLLECTIVES:
        return "collective"
    if opcodes & {"custom-call", "conditional", "sort", "rng-bit-generator"}:
        return "other"
    return "copy" if opcodes <= _MOVES else "elementwise"


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    opcode, inside = rest[:start], rest[start + 1 : end]
    return Instruction(
        name.lstrip("%"),
        sum(_nbytes(*array) for array in _ARRAY.findall(shape)),
        opcode,
        tuple(re.findall(r"%([\w.\-]+)", inside)),
        inside if opcode == "parameter" else rest[end + 1 :],
    )


def _nbytes(kind: str, sizes: str, layout: str) -> int:
    if _ON_CHIP in layout:
        return 0
    bits = re.search(r"\d+", kind)
    size = int(bits[0]) if bits else _SIZES.get(kind, 8)
    return math.prod(int(size) for size in re.findall(r"\d+", sizes)) * size // 8


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")
