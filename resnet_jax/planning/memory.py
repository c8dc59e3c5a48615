"""Which values of a program become arrays, when they live, and how much they move.

A compiler writes few of a program's values to memory: elementwise work is fused into
what reads it. The rules here, in the order of the trace:

1. Kernels (convolutions, matrix products, windows, sorts, scatters, loops) read arrays
   and write arrays. What the program is given and what it returns are arrays too.
2. A reduction writes an array. Its operand is fused into it on an accelerator; XLA:CPU
   leaves reductions to a library that reads arrays, multiplying two on its way.
3. Anything else is computed again by each of its readers, from the arrays that it is
   made of, unless that would read more bytes than writing it once and reading it, or
   is expensive (exp, log, tanh) and has several readers.
4. Where a kernel needs such a value as an array, elementwise readers still compute it
   again if it is made of one array of its size only, and read the array otherwise.
5. An array lives from its operation to the last one that reads it. Elementwise work
   takes over the memory of an operand of its size that dies there.
6. Reshapes are free. A loop adds the peak of its body. What ``jax.checkpoint`` computes
   again is not merged with the first time, but on XLA:CPU, which drops its barriers.

Layouts, padding to tiles, the scratch memory of kernels and the pieces between
allocations are left out. ``benchmarks/plan_memory.py`` compares the sum with XLA's.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from resnet_jax.planning.program import Operation, Program, Value

KERNELS = frozenset(
    {
        "conv_general_dilated",
        "dot_general",
        "ragged_dot_general",
        "scan",
        "while",
        "cond",
        "sort",
        "top_k",
        "cumsum",
        "cumprod",
        "cummax",
        "scatter",
        "scatter-add",
        "scatter_add",
        "select_and_scatter_add",
        "select_and_gather_add",
        "reduce_window",
        "reduce_window_sum",
        "reduce_window_max",
        "reduce_window_min",
        "threefry2x32",
        "random_bits",
        "dynamic_update_slice",
        "all_gather",
        "all_to_all",
        "psum",
        "reduce_scatter",
        "shard_map",
    }
)

REDUCTIONS = frozenset(
    {
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_prod",
        "reduce_and",
        "reduce_or",
        "argmax",
        "argmin",
    }
)

_MULTIPLIES = frozenset({"mul", "square", "integer_pow"})
_PARTS = frozenset({"slice", "dynamic_slice", "gather", "unstack"})
_EXPENSIVE = frozenset({"exp", "log", "tanh", "logistic", "erf", "pow", "sin", "cos"})


@dataclasses.dataclass(frozen=True)
class Compiler:
    """What differs between compilers.

    Attributes:
      fuses_reductions: whether a reduction computes its operand itself.
      keeps_barriers: whether what ``jax.checkpoint`` computes again stays apart.
    """

    fuses_reductions: bool
    keeps_barriers: bool


ACCELERATOR = Compiler(fuses_reductions=True, keeps_barriers=True)
XLA_CPU = Compiler(fuses_reductions=False, keeps_barriers=False)


@dataclasses.dataclass(frozen=True)
class Peak:
    """The moment of a program at which most memory is taken.

    Attributes:
      nbytes: of all arrays but those that it is given and returns.
      arrays: those arrays, without the ones inside loops.
      operation: what runs then; None of an empty program.
    """

    nbytes: int
    arrays: tuple[Value, ...]
    operation: Operation | None


class Pass(NamedTuple):
    """An operation that reads and writes arrays, or the first of several fused ones.

    Attributes:
      operation: of the program, or of a loop's or branch's.
      times: how often it runs.
      nbytes: read and written, all times together.
    """

    operation: Operation
    times: int
    nbytes: int


class Memory:
    """The arrays of a program, as a compiler would choose them.

    Attributes:
      arrays: the values that are written to memory.
    """

    def __init__(self, program: Program, compiler: Compiler):
        self.program, self.compiler = program, compiler
        self.arrays = {*program.inputs, *program.constants}
        # The arrays that a reader of a value reads.
        self._sources = {value: frozenset([value]) for value in self.arrays}
        required, readers = self._required(), self._readers()
        for operation in program.operations:
            self._place(operation, required, readers)

    def peak(self) -> Peak:
        """When most memory is taken, and by which arrays."""
        returned = _values(self.program.outputs)
        own = self.arrays - returned - {*self.program.inputs, *self.program.constants}
        reads = [self.reads(operation) for operation in self.program.operations]
        last = {value: i for i, values in enumerate(reads) for value in values}
        live: set[Value] = set()
        size, peak = 0, Peak(0, (), None)
        for index, operation in enumerate(self.program.operations):
            born = own.intersection(operation.writes)
            dying = {value for value in reads[index] & own if last[value] == index}
            live |= born
            size += _size(born)
            now = size + self._inside(operation) - _taken_over(operation, born, dying)
            if now > peak.nbytes:
                peak = Peak(now, tuple(live), operation)
            dead = dying | {value for value in born if value not in last}
            live -= dead
            size -= _size(dead)
        return peak

    def traffic(self) -> int:
        """Bytes that the operations read and write; see ``passes``."""
        return sum(one.nbytes for one in self.passes())

    def passes(self) -> Iterator[Pass]:
        """The operations that write arrays, in their order.

        Fused operations that read the same large arrays, none of which waits for
        another, share one pass over them: the sums of a normalisation's gradient. The
        first is given what it reads. A loop is followed by its body's operations, and
        of branches the one that moves most counts.
        """
        level = dict.fromkeys(self.arrays, 0)
        shared: set[tuple[int, frozenset[Value]]] = set()
        for operation in self.program.operations:
            written = self.arrays.intersection(operation.writes)
            if not written:
                continue
            reads = self.reads(operation)
            depth = 1 + max((level.get(value, 0) for value in reads), default=0)
            level |= dict.fromkeys(written, depth)
            nbytes = _size(written)
            if operation.name in KERNELS:
                # What a loop is given, its body reads.
                nbytes += 0 if operation.inner else _size(reads)
            elif (depth, large := _large(reads)) not in shared:
                shared.add((depth, large))
                most = max(value.nbytes for value in written)
                nbytes += _size_read(operation, reads, most)
            yield Pass(operation, 1, nbytes)
            for inner in self._passes_inside(operation):
                times = operation.length
                yield Pass(inner.operation, times * inner.times, times * inner.nbytes)

    def _passes_inside(self, operation: Operation) -> list[Pass]:
        """Of one turn of a loop, or of the branch that moves most."""
        bodies = [
            list(Memory(body, self.compiler).passes()) for body in operation.inner
        ]
        return max(bodies, key=lambda body: sum(one.nbytes for one in body), default=[])

    def reads(self, operation: Operation) -> set[Value]:
        """The arrays that an operation reads; none where it is fused into others."""
        if not self.arrays.intersection(operation.writes):
            return set()
        if operation.name in KERNELS:
            return set(operation.reads)
        if self._reduces_arrays(operation):
            return self._reduced(operation)
        return self._made_of(operation)

    def _made_of(self, operation: Operation) -> set[Value]:
        return {
            source
            for value in operation.reads
            for source in self._sources.get(value, frozenset([value]))
        }

    def _reduces_arrays(self, operation: Operation) -> bool:
        return operation.name in REDUCTIONS and not self.compiler.fuses_reductions

    def _required(self) -> set[Value]:
        """The values that something needs as arrays."""
        required = _values(self.program.outputs) | self.program.barriers
        for operation in self.program.operations:
            if operation.name in KERNELS:
                required.update(operation.reads)
            elif self._reduces_arrays(operation):
                required |= self._reduced(operation)
        return required

    def _readers(self) -> Counter[Value]:
        readers = Counter(_values(self.program.outputs))
        for operation in self.program.operations:
            readers.update(set(operation.reads))
        return readers

    def _place(
        self, operation: Operation, required: set[Value], readers: Counter[Value]
    ) -> None:
        """Decides which results of an operation are arrays."""
        if operation.name in KERNELS or operation.name in REDUCTIONS:
            self.arrays.update(operation.writes)
            self._sources |= {value: frozenset([value]) for value in operation.writes}
            return
        sources = frozenset(self._made_of(operation))
        for value in operation.writes:
            read = _size_read(operation, sources, value.nbytes)
            count = readers[value]
            again, once = count * read, read + (1 + count) * value.nbytes
            expensive = count > 1 and operation.name in _EXPENSIVE
            is_array = value in required or again > once or expensive
            if is_array:
                self.arrays.add(value)
            of_one = read < 2 * value.nbytes and value in required and not expensive
            keeps_sources = of_one or not is_array
            self._sources[value] = sources if keeps_sources else frozenset([value])

    def _reduced(self, operation: Operation) -> set[Value]:
        """The arrays that a library's reduction reads: it multiplies on its way.

        A sign is taken outside of the sum, and a factor that is the same for many
        elements makes an array of the product.
        """
        value = operation.reads[0]
        producer = self._producer(value)
        while producer is not None and producer.name == "neg":
            value = producer.reads[0]
            producer = self._producer(value)
        if producer is None or producer.name not in _MULTIPLIES:
            return {value}
        whole = all(self._is_whole(x, value.nbytes) for x in producer.reads)
        by_constant = producer.name == "mul" and len(producer.reads) < 2
        return set(producer.reads) if whole and not by_constant else {value}

    def _is_whole(self, value: Value, nbytes: int) -> bool:
        producer = self._producer(value)
        repeated = producer is not None and producer.name == "broadcast_in_dim"
        return value.nbytes == nbytes and not repeated

    def _producer(self, value: Value) -> Operation | None:
        made = value.producer >= 0
        return self.program.operations[value.producer] if made else None

    def _inside(self, operation: Operation) -> int:
        """The peak of what a loop or branch runs; its results are arrays outside."""
        return max(
            (Memory(body, self.compiler).peak().nbytes for body in operation.inner),
            default=0,
        )


def _taken_over(operation: Operation, born: set[Value], dying: set[Value]) -> int:
    """Bytes of results that lie where an operand lay."""
    if operation.name in KERNELS or operation.name in REDUCTIONS:
        return 0
    free = Counter(value.nbytes for value in dying)
    return sum(
        nbytes * min(count, free[nbytes])
        for nbytes, count in Counter(value.nbytes for value in born).items()
    )


def _size_read(operation: Operation, sources: Iterable[Value], nbytes: int) -> int:
    """Bytes read of the sources: of parts, no more than they have themselves."""
    total = _size(sources)
    return min(total, nbytes) if operation.name in _PARTS else total


def _large(values: set[Value]) -> frozenset[Value]:
    """Without those that are small beside the largest one."""
    least = max((value.nbytes for value in values), default=0) / 16
    return frozenset(value for value in values if value.nbytes >= least)


def _size(values: Iterable[Value]) -> int:
    return sum(value.nbytes for value in values)


def _values(values: Iterable[Value | None]) -> set[Value]:
    return {value for value in values if value is not None}
