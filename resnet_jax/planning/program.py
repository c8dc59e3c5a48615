"""A traced program as a flat list of operations on values.

Calls are inlined, equal operations are merged and dead ones removed, as compilers do;
loops and branches stay operations with programs of their own inside.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

from resnet_jax.analysis.complexity import inner_programs

_CALLS = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "checkpoint",
        "remat",
        "remat2",
    }
)

_VIEWS = frozenset(
    {
        "reshape",
        "squeeze",
        "expand_dims",
        "broadcast_in_dim",
        "stop_gradient",
        "reshard",
        "sharding_constraint",
        "copy",
        "copy_p",
        "optimization_barrier",
    }
)

_LOOPS = frozenset({"scan", "while", "cond"})


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program.

    Attributes:
      shape: its shape.
      nbytes: its size.
      producer: the index of its operation; -1 for what the program is given.
    """

    shape: tuple[int, ...]
    nbytes: int
    producer: int = -1


@dataclasses.dataclass(eq=False)
class Operation:
    """One operation.

    Attributes:
      name: of its primitive.
      equation: the traced one.
      reads, writes: its values, literals left out.
      inner: the programs that a loop or branch runs.
    """

    name: str
    equation: Any
    reads: list[Value]
    writes: list[Value]
    inner: "list[Program]"

    @property
    def length(self) -> int:
        """How often a loop runs its body; 1 where it is not known."""
        return self.equation.params.get("length", 1) if self.name == "scan" else 1


@dataclasses.dataclass(eq=False)
class Program:
    """Operations in their order.

    Attributes:
      inputs: what it is given, in the order of its arguments.
      constants: arrays that are part of the program.
      operations: in the order of the trace.
      outputs: what it returns; None for a literal.
      barriers: values that are read behind a rematerialisation's barrier, so that they
        must be arrays.
    """

    inputs: list[Value]
    constants: list[Value]
    operations: list[Operation]
    outputs: list[Value | None]
    barriers: set[Value]


def flatten_program(jaxpr: Any, barriers: bool = True) -> Program:
    """The flat program of a (closed) jaxpr.

    Args:
      jaxpr: as ``jax.jit(f).trace(...).jaxpr`` gives it.
      barriers: whether ``jax.checkpoint`` keeps the compiler from merging what is
        computed again with what was computed first. XLA:CPU ignores them.
    """
    return _Flattener(barriers).run(getattr(jaxpr, "jaxpr", jaxpr))


class _Flattener:
    """Builds one program; programs of loops are built by their own."""

    def __init__(self, barriers: bool):
        self.keep_barriers = barriers
        self.operations: list[Operation] = []
        self.seen: dict[Hashable, list[Value]] = {}
        self.barriers: set[Value] = set()

    def run(self, jaxpr: Any) -> Program:
        inputs = [_value(var) for var in jaxpr.invars]
        constants = [_value(var) for var in jaxpr.constvars]
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= dict(zip(jaxpr.constvars, constants, strict=True))
        outputs = self.walk(jaxpr, known, scope=0)
        operations = _alive(self.operations, outputs)
        for index, operation in enumerate(operations):
            for value in operation.writes:
                value.producer = index
        return Program(inputs, constants, operations, outputs, self.barriers)

    def walk(
        self, jaxpr: Any, known: dict[Any, Value], scope: int
    ) -> list[Value | None]:
        for equation in jaxpr.eqns:
            reads = [_read(atom, known) for atom in equation.invars]
            if _is_view(equation) and reads[0] is not None:
                writes: Sequence[Value | None] = reads
            elif equation.primitive.name in _CALLS:
                writes = self.call(equation, reads, scope)
            else:
                writes = self.append(equation, reads, scope)
            # A call may hand a literal through, which no one has to hold.
            for var, value in zip(equation.outvars, writes, strict=True):
                known[var] = value or _value(var)
        return [_read(atom, known) for atom in jaxpr.outvars]

    def call(
        self, equation: Any, reads: list[Value | None], scope: int
    ) -> list[Value | None]:
        inner = next(inner_programs(equation))
        if self.keep_barriers and _is_barrier(equation):
            scope = len(self.operations) + 1
            self.barriers |= {value for value in reads if value is not None}
        known = {
            var: value or _value(var)
            for var, value in zip(inner.invars, reads, strict=True)
        }
        known |= {var: _value(var) for var in inner.constvars}
        return self.walk(inner, known, scope)

    def append(
        self, equation: Any, reads: list[Value | None], scope: int
    ) -> list[Value]:
        key = _key(equation, reads, scope)
        if key is not None and key in self.seen:
            return self.seen[key]
        name = equation.primitive.name
        inner = [
            _Flattener(self.keep_barriers).run(jaxpr)
            for jaxpr in (inner_programs(equation) if name in _LOOPS else ())
        ]
        operands = [value for value in reads if value is not None]
        writes = [_value(var) for var in equation.outvars]
        self.operations.append(Operation(name, equation, operands, writes, inner))
        if key is not None:
            self.seen[key] = writes
        return writes


def _value(var: Any) -> Value:
    return Value(tuple(getattr(var.aval, "shape", ())), _size(var.aval))


def _size(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ())) * _itemsize(aval)


def _itemsize(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    # A typed key of jax.random is a few words.
    return int(getattr(dtype, "itemsize", 0) or 0)


def _read(atom: Any, known: dict[Any, Value]) -> Value | None:
    """The value of a variable; None of a literal."""
    return None if hasattr(atom, "val") else known[atom]


def _is_view(equation: Any) -> bool:
    """Whether the result is the operand's memory, read as another shape."""
    if equation.primitive.name not in _VIEWS:
        return False
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    return len(equation.outvars) == 1 and _size(before) == _size(after)


def _is_barrier(equation: Any) -> bool:
    """Whether this computes again, for a gradient, what must not be kept."""
    params = equation.params
    return bool(params.get("prevent_cse") and params.get("differentiated"))


def _key(equation: Any, reads: list[Value | None], scope: int) -> Hashable | None:
    """Equal for operations that compute the same."""
    operands = tuple(
        id(value) if value is not None else str(atom)
        for value, atom in zip(reads, equation.invars, strict=True)
    )
    params = tuple(sorted(equation.params.items(), key=lambda item: item[0]))
    key = (scope, equation.primitive.name, operands, params)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _alive(
    operations: list[Operation], outputs: Sequence[Value | None]
) -> list[Operation]:
    """The operations that an output needs."""
    needed = {value for value in outputs if value is not None}
    kept = []
    for operation in reversed(operations):
        if needed.intersection(operation.writes):
            kept.append(operation)
            needed.update(operation.reads)
    return kept[::-1]
