"""Work and traffic of a compiled program, read from its optimised HLO.

XLA's own cost analysis gives one sum for a program; here every operation that a device
is given counts apart: its multiply-adds, and the bytes of its operands and results. A
fusion is one operation. Custom calls to cuDNN and cuBLAS are read like the convolutions
and products that they stand for.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0} | {
    f"{kind}{bits}": bits
    for kind, sizes in {
        "s": (2, 4, 8, 16, 32, 64),
        "u": (2, 4, 8, 16, 32, 64),
        "f": (16, 32, 64),
        "bf": (16,),
        "c": (64, 128),
    }.items()
    for bits in sizes
}
_FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
    }
)
"""What moves nothing."""

_MOVES = frozenset(
    {
        "bitcast",
        "broadcast",
        "concatenate",
        "constant",
        "convert",
        "copy",
        "iota",
        "pad",
        "parameter",
        "reshape",
        "slice",
        "transpose",
        "tuple",
    }
)
"""A fusion of these alone computes nothing."""

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

Shape = tuple[str, tuple[int, ...]]
"""Element type and dimensions."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      name: of the result.
      shapes: the result's arrays: one, or those of a tuple.
      opcode: what it does.
      operands: names.
      attributes: the rest of the line.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def nbytes(self) -> int:
        """Size of the result."""
        return sum(
            math.prod(shape) * _BITS.get(kind, 8) // 8 for kind, shape in self.shapes
        )


@dataclasses.dataclass(frozen=True)
class Operation:
    """What the device runs as one.

    Attributes:
      kind: convolution, product, pooling, reduction, elementwise, copy, or other.
      name: of the instruction.
      multiply_adds: of the convolutions and products in it, without the taps on
        padding and on the zeros of a dilated input.
      nbytes: of its operands and results.
    """

    kind: str
    name: str
    multiply_adds: int
    nbytes: int


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
    """What a computation runs, in order; a loop's body once for each of its turns.

    A loop whose turns the compiler does not tell counts once, and of a conditional's
    branches only the operands.
    """
    inside = computations[name]
    for instruction in inside.values():
        if instruction.opcode in ("while", "call"):
            body = [
                operation
                for called in _CALLED.findall(instruction.attributes)
                for operation in operations(computations, called)
            ]
            turns = _TURNS.search(instruction.attributes)
            for operation in body:
                yield _repeated(operation, int(turns[1]) if turns else 1)
        elif instruction.opcode not in _FREE and not instruction.opcode.endswith(
            "-done"
        ):
            yield _operation(computations, inside, instruction)


def _repeated(operation: Operation, times: int) -> Operation:
    return dataclasses.replace(
        operation,
        multiply_adds=times * operation.multiply_adds,
        nbytes=times * operation.nbytes,
    )


def _operation(
    computations: Computations, inside: dict[str, Instruction], own: Instruction
) -> Operation:
    parts = list(_parts(computations, inside, own))
    read = sum(inside[name].nbytes for name in set(own.operands) if name in inside)
    return Operation(
        _kind([part for _, part in parts]),
        own.name,
        sum(_multiply_adds(around, part) for around, part in parts),
        read + own.nbytes,
    )


def _parts(
    computations: Computations, inside: dict[str, Instruction], own: Instruction
) -> Iterator[tuple[dict[str, Instruction], Instruction]]:
    """The instruction, or what it fuses, each with those around it."""
    if own.opcode != "fusion":
        yield inside, own
        return
    for called in _CALLED.findall(own.attributes):
        fused = computations[called]
        for part in fused.values():
            yield from _parts(computations, fused, part)


def _kind(parts: Sequence[Instruction]) -> str:
    opcodes = {part.opcode for part in parts}
    calls = [part for part in parts if part.opcode == "custom-call"]
    if "convolution" in opcodes or any(_labels(part) for part in calls):
        return "convolution"
    if "dot" in opcodes or any(_contracted(part) for part in calls):
        return "product"
    if opcodes & {"reduce-window", "select-and-scatter"}:
        return "pooling"
    if "reduce" in opcodes:
        return "reduction"
    if opcodes & {"custom-call", "conditional", "sort", "rng-bit-generator"}:
        return "other"
    return "copy" if opcodes <= _MOVES else "elementwise"


def _multiply_adds(inside: dict[str, Instruction], own: Instruction) -> int:
    given = [inside[name].shapes[0][1] for name in own.operands if name in inside]
    result = own.shapes[0][1]
    if _labels(own):
        if "convBackwardInput" in own.attributes:
            return _convolved(own.attributes, result, given[1], given[0])
        if "convBackwardFilter" in own.attributes:
            return _convolved(own.attributes, given[0], result, given[1])
        return _convolved(own.attributes, given[0], given[1], result)
    contracted = _contracted(own)
    if contracted is None:
        return 0
    return math.prod(result) * math.prod(given[0][axis] for axis in contracted)


def _labels(own: Instruction) -> re.Match[str] | None:
    """Of a convolution's dimensions: those of input, kernel and output."""
    if own.opcode not in ("convolution", "custom-call"):
        return None
    return re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", own.attributes)


def _contracted(own: Instruction) -> list[int] | None:
    """The axes of a product's first factor over which it sums."""
    if own.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", own.attributes)
    elif own.opcode == "custom-call":
        found = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', own.attributes)
    else:
        return None
    if found is None:
        return None
    return [int(axis) for axis in re.findall(r"\d+", found[1])]


def _convolved(
    attributes: str,
    image: Sequence[int],
    kernel: Sequence[int],
    output: Sequence[int],
) -> int:
    """Multiply-adds of a convolution, the taps on zeros left out."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None
    of_image, of_kernel, of_output = labels.groups()
    window = _window(attributes)
    total = image[of_image.index("b")] * kernel[of_kernel.index("i")]
    total *= kernel[of_kernel.index("o")]
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    total //= int(groups[1]) if groups else 1
    for axis in sorted(set(of_output) - {"b", "f"}):
        total *= _taps(
            image[of_image.index(axis)],
            kernel[of_kernel.index(axis)],
            output[of_output.index(axis)],
            {name: values[int(axis)] for name, values in window.items()},
        )
    return total


def _window(attributes: str) -> dict[str, list[str]]:
    """Each field of a window, by axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = [field.split("=") for field in (found[1] if found else "").split()]
    return {name: values.split("x") for name, values in fields}


def _taps(size: int, taps: int, outputs: int, window: dict[str, str]) -> int:
    """Pairs of an output and a tap, along one axis, that meet a pixel."""
    low = int(window.get("pad", "0_0").split("_")[0])
    holes = int(window.get("lhs_dilate", 1))
    at = np.arange(outputs)[:, None] * int(window.get("stride", 1)) - low
    at = at + np.arange(taps) * int(window.get("rhs_dilate", 1))
    return int(((at >= 0) & (at % holes == 0) & (at // holes < size)).sum())


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    return Instruction(
        name.lstrip("%"),
        tuple(
            (kind, tuple(int(size) for size in re.findall(r"\d+", sizes)))
            for kind, sizes in _ARRAY.findall(shape)
        ),
        rest[:start],
        tuple(re.findall(r"%([\w.\-]+)", rest[start:end])),
        rest[end + 1 :],
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at ``start`` closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")
