"""Memory traffic of a compiled program, operation by operation.

    JAX_PLATFORMS=cpu python -m benchmarks.hlo resnet50 --target h200 --batch 256
    python -m benchmarks.hlo cifar_resnet20 fused_norm=true norm_variance=fast

prints the operations of a training step by kind, counted in XLA's optimised HLO. The
target need not be here (``resnet-jax plan --compile`` says which wheels it needs).

XLA's cost analysis gives one sum for a program. Here each operation that the device
launches counts on its own: the bytes of its operands and results. A fusion is one
operation.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
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

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\]")
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
      attributes: the rest of the line.
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
      kind: convolution, product, pooling, reduction, elementwise, copy or other.
      name: of the instruction.
      nbytes: of its operands and results, over all iterations of a loop around it.
    """

    kind: str
    name: str
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
                    nbytes = operation.nbytes * (int(trips[1]) if trips else 1)
                    yield dataclasses.replace(operation, nbytes=nbytes)
        elif instruction.opcode not in _FREE and not instruction.opcode.endswith(
            "-done"
        ):
            operands = {name for name in instruction.operands if name in inside}
            nbytes = instruction.nbytes + sum(inside[name].nbytes for name in operands)
            kind = _kind(list(_parts(computations, instruction)))
            yield Operation(kind, instruction.name, nbytes)


def by_kind(found: Iterable[Operation]) -> dict[str, tuple[int, int]]:
    """The number of operations of each kind, and their bytes."""
    kinds: dict[str, tuple[int, int]] = {}
    for operation in found:
        count, nbytes = kinds.get(operation.kind, (0, 0))
        kinds[operation.kind] = count + 1, nbytes + operation.nbytes
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
    opcodes = {part.opcode for part in parts}
    calls = " ".join(p.attributes for p in parts if p.opcode == "custom-call")
    if "convolution" in opcodes or "dim_labels=" in calls:
        return "convolution"
    if "dot" in opcodes or "lhs_contracting_dimensions" in calls:
        return "product"
    if opcodes & {"reduce-window", "select-and-scatter"}:
        return "pooling"
    if "reduce" in opcodes:
        return "reduction"
    if opcodes & {"custom-call", "conditional", "sort", "rng-bit-generator"}:
        return "other"
    return "copy" if opcodes <= _MOVES else "elementwise"


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    return Instruction(
        name.lstrip("%"),
        sum(_nbytes(kind, sizes) for kind, sizes in _ARRAY.findall(shape)),
        rest[:start],
        tuple(re.findall(r"%([\w.\-]+)", rest[start:end])),
        rest[end + 1 :],
    )


def _nbytes(kind: str, sizes: str) -> int:
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


def compiled_step(
    model: str, target: str, batch: int, dtype: str, **options: Any
) -> str:
    """The optimised HLO of a training step; see ``targets.compile.target_mesh``."""
    from resnet_jax.models.platforms import compiling_for
    from resnet_jax.targets.compile import target_mesh
    from resnet_jax.training.benchmark import abstract_batch, synthetic_learner
    from resnet_jax.training.step import make_train_step

    mesh = target_mesh(target)
    platform = mesh.devices.flat[0].platform
    learner = synthetic_learner(model, batch, dtype=dtype, mesh=mesh, **options)
    with compiling_for(platform):
        traced = make_train_step(learner).trace(
            learner.abstract_state(), None, abstract_batch(learner)
        )
    lowering = {"gpu": "cuda"}.get(platform, platform)
    text = traced.lower(lowering_platforms=(lowering,)).compile().as_text()
    assert text is not None
    return text


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE")
    parser.add_argument("--target", default="cpu", choices=("cpu", "h100", "h200"))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args(arguments)
    options = parse_options(given.options)
    text = compiled_step(given.model, given.target, given.batch, given.dtype, **options)
    kinds = by_kind(operations(read(text)))
    counts, sizes = zip(*kinds.values(), strict=True)
    kinds["all"] = sum(counts), sum(sizes)
    print(f"{'kind':<12}{'operations':>11}{'MB/image':>10}")
    for kind, (count, nbytes) in kinds.items():
        print(f"{kind:<12}{count:>11,}{nbytes / 1e6 / given.batch:>10.2f}")


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Options of the net from OPTION=VALUE; values as in JSON, else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = text
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
