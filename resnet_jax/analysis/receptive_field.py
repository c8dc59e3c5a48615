"""What each module of a net sees of the image, followed through the traced program."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from resnet_jax.analysis.complexity import Path, Program, inner_programs

Span = tuple[Fraction, Fraction]
"""The first and the last of the pixels along an axis of the image."""


class Window(NamedTuple):
    """Pixels that move with the position along an axis of an array.

    Position i sees those from ``low + i * stride`` to ``high + i * stride``.
    """

    axis: int
    stride: Fraction
    low: Fraction
    high: Fraction

    def span(self, size: int) -> Span:
        """The pixels that ``size`` positions see together."""
        return self.low, self.high + (size - 1) * self.stride


class View(NamedTuple):
    """What an array sees along one axis of the image.

    The positions see different pixels through the window, and all of them the common
    ones.
    """

    window: Window | None = None
    common: Span | None = None


Reach = tuple[View, View] | None
"""What an array sees along the image's height and width; None: it sees no image."""


class _Tap(NamedTuple):
    """Which positions of an operand a result needs, along one axis of the operand.

    Position i of the result's ``axis`` needs the operand's from ``i * scale + first``
    to ``i * scale + last``.
    """

    axis: int
    scale: Fraction = Fraction(1)
    first: Fraction = Fraction(0)
    last: Fraction = Fraction(0)


_Taps = Sequence[_Tap | None]
"""A tap for each axis of an operand; None: each position needs the whole axis."""


class Output(NamedTuple):
    """What a module returned: the shape of one image's, its reach, and how often."""

    shape: tuple[int, ...] | None
    reach: Reach
    repeats: int


def module_outputs(
    program: Program, image_shape: tuple[int, ...]
) -> dict[Path, Output]:
    """What each module of a program returned for images (h, w, channels)."""
    return _Walk(program, image_shape).outputs


class _Walk:
    """Follows the image through a program and keeps what each module returned.

    Attributes:
      outputs: by the module's path; of a loop, what the last round returned.
    """

    def __init__(self, program: Program, image_shape: tuple[int, ...]):
        self.outputs: dict[Path, Output] = {}
        self._program = program
        height, width = image_shape[:2]
        one, zero = Fraction(1), Fraction(0)
        self._whole_image: Reach = (
            View(None, (zero, Fraction(height - 1))),
            View(None, (zero, Fraction(width - 1))),
        )
        image: Reach = (
            View(Window(1, one, zero, zero)),
            View(Window(2, one, zero, zero)),
        )
        variables: list[Reach] = [None] * (len(program.jaxpr.invars) - 1)
        self._follow(program.jaxpr, [*variables, image], 1)

    def _follow(self, jaxpr: Any, inputs: Sequence[Reach], times: int) -> list[Reach]:
        """The reaches of a jaxpr's results; ``times`` is how often it runs."""
        reaches = dict(zip(jaxpr.invars, inputs, strict=True))

        def reach(atom):
            # A literal has a value, and no name; constants are not among the inputs.
            return None if hasattr(atom, "val") else reaches.get(atom)

        for equation in jaxpr.eqns:
            operands = [reach(atom) for atom in equation.invars]
            path = self._program.returned_by(equation)
            if path is not None:
                shape = equation.outvars[0].aval.shape[1:]
                self.outputs[path] = Output(shape, operands[0], times)
            results = self._results(equation, operands, times)
            reaches.update(zip(equation.outvars, results, strict=True))
        return [reach(atom) for atom in jaxpr.outvars]

    def _results(self, equation, operands, times):
        if not any(operands):
            return [None] * len(equation.outvars)
        name = equation.primitive.name
        if name in _RULES:
            return _by_rule(_RULES[name], equation, operands)
        if name == "scan":
            return self._loop(equation, operands, times)
        if name == "cond":
            return self._branches(equation, operands, times)
        inner = list(inner_programs(equation))
        if len(inner) == 1 and _is_call(equation, inner[0]):
            return self._follow(inner[0], operands, times)
        for program in inner:
            self._follow(program, [self._whole_image] * len(program.invars), times)
        return [self._whole_image] * len(equation.outvars)

    def _loop(self, equation, operands, times):
        """A scan: its operands are constants, carried and stacked, in this order.

        How many there are of each is told by the ranks, in every version of jax: what
        is stacked has one axis more than what the body sees of it.
        """
        (body,) = inner_programs(equation)
        length = equation.params["length"]
        num_stacked = _differing_ranks(equation.invars, body.invars)
        num_collected = _differing_ranks(equation.outvars, body.outvars)
        num_carried = len(equation.outvars) - num_collected
        end = len(operands) - num_stacked
        constants, carried = (
            operands[: end - num_carried],
            operands[end - num_carried : end],
        )
        slices = [
            _tapped(
                reach,
                [None, *map(_Tap, range(len(atom.aval.shape)))],
                operand.aval.shape,
            )
            for reach, atom, operand in zip(
                operands[end:], body.invars[end:], equation.invars[end:], strict=True
            )
        ]
        shapes = [atom.aval.shape for atom in body.outvars[num_carried:]]
        collected: list[Reach] = [None] * num_collected
        for _ in range(length):
            before = carried
            results = self._follow(body, constants + carried + slices, times * length)
            carried = results[:num_carried]
            collected = [
                _joined(pair, shape)
                for *pair, shape in zip(
                    collected, results[num_carried:], shapes, strict=True
                )
            ]
            if carried == before:
                break
        return carried + [
            _tapped(reach, [_Tap(axis + 1) for axis in range(len(shape))], shape)
            for reach, shape in zip(collected, shapes, strict=True)
        ]

    def _branches(self, equation, operands, times):
        choice, *arguments = operands
        results = [
            self._follow(branch, arguments, times)
            for branch in inner_programs(equation)
        ]
        return [
            _joined([choice, *reaches], out.aval.shape)
            for out, *reaches in zip(equation.outvars, *results, strict=True)
        ]


def _by_rule(rule, equation, operands):
    shapes = [atom.aval.shape for atom in equation.invars]
    results = []
    for k, out in enumerate(equation.outvars):
        reaches = [
            _tapped(reach, rule(equation, i, k), shape)
            for i, (reach, shape) in enumerate(zip(operands, shapes, strict=True))
        ]
        results.append(_joined(reaches, out.aval.shape))
    return results


def _is_call(equation, inner):
    """Whether an equation hands its operands to a program and returns its results."""
    pairs = ((equation.invars, inner.invars), (equation.outvars, inner.outvars))
    return all(
        [a.aval.shape for a in outer] == [a.aval.shape for a in own]
        for outer, own in pairs
    )


def _differing_ranks(outer, inner):
    return sum(
        len(a.aval.shape) != len(b.aval.shape)
        for a, b in zip(outer, inner, strict=True)
    )


def _tapped(reach: Reach, taps: _Taps, shape: tuple[int, ...]) -> Reach:
    """The reach of a result that needs an operand of ``shape`` through ``taps``."""
    if reach is None:
        return None
    height, width = (_tapped_view(view, taps, shape) for view in reach)
    return height, width


def _tapped_view(view, taps, shape):
    window, common = view
    if window is None:
        return view
    tap = taps[window.axis]
    if tap is None:
        return View(None, _hull(common, window.span(shape[window.axis])))
    low = window.low + window.stride * tap.first
    high = window.high + window.stride * tap.last
    return View(Window(tap.axis, window.stride * tap.scale, low, high), common)


def _joined(reaches: Iterable[Reach], shape: tuple[int, ...]) -> Reach:
    """The reach of an array of ``shape`` that depends on all of several."""
    seen = [reach for reach in reaches if reach is not None]
    if not seen:
        return None
    height, width = (_joined_views(views, shape) for views in zip(*seen, strict=True))
    return height, width


def _joined_views(views, shape):
    window, common = views[0]
    for other, other_common in views[1:]:
        common = _hull(common, other_common)
        if window is None or other is None:
            window = window or other
        elif window[:2] == other[:2]:
            low, high = min(window.low, other.low), max(window.high, other.high)
            window = window._replace(low=low, high=high)
        else:
            # They move apart: what one of them sees is kept as seen by all.
            common = _hull(common, other.span(shape[other.axis]))
    return View(window, common)


def _hull(a: Span | None, b: Span | None) -> Span | None:
    if a is None or b is None:
        return a or b
    return min(a[0], b[0]), max(a[1], b[1])


# How the results of an operation tap its operands: for the equation and the indices of
# the operand and of the result, a tap for each axis of the operand.


def _elementwise(equation, operand, result):
    out = equation.outvars[result].aval.shape
    shape = equation.invars[operand].aval.shape
    # An axis of size 1 beside a longer one is repeated; a scalar has no axes.
    return [
        _Tap(axis) if size == out[axis] else None for axis, size in enumerate(shape)
    ]


def _convolution(equation, operand, result):
    rank = len(equation.invars[operand].aval.shape)
    taps: list[_Tap | None] = [None] * rank
    if operand == 1:
        return taps
    params = equation.params
    lhs, rhs, out = params["dimension_numbers"]
    taps[lhs[0]] = _Tap(out[0])
    kernel = equation.invars[1].aval.shape
    for index in range(rank - 2):
        taps[lhs[2 + index]] = _window_tap(
            out[2 + index],
            kernel[rhs[2 + index]],
            params["window_strides"][index],
            params["padding"][index],
            params["lhs_dilation"][index],
            params["rhs_dilation"][index],
        )
    return taps


def _pooling(equation, operand, result):
    rank = len(equation.invars[operand].aval.shape)
    params = equation.params
    return [
        _window_tap(
            axis,
            params["window_dimensions"][axis],
            params["window_strides"][axis],
            params["padding"][axis],
            params["base_dilation"][axis],
            params["window_dilation"][axis],
        )
        for axis in range(rank)
    ]


def _window_tap(axis, size, strides, padding, base_dilation, window_dilation):
    first, last = -padding[0], (size - 1) * window_dilation - padding[0]
    return _Tap(axis, *(_exact(n, base_dilation) for n in (strides, first, last)))


def _exact(numerator, denominator=1):
    # The parameters of an equation may be numpy's integers, which a fraction keeps.
    return Fraction(int(numerator), int(denominator))


def _product(equation, operand, result):
    contracted, batch = equation.params["dimension_numbers"]
    ranks = [len(atom.aval.shape) for atom in equation.invars]
    free = [
        [a for a in range(ranks[k]) if a not in contracted[k] and a not in batch[k]]
        for k in (0, 1)
    ]
    # The result has the batch axes, then the left operand's, then the right one's.
    offset = len(batch[0]) + (len(free[0]) if operand == 1 else 0)
    taps: list[_Tap | None] = [None] * ranks[operand]
    for position, axis in enumerate(batch[operand]):
        taps[axis] = _Tap(position)
    for position, axis in enumerate(free[operand]):
        taps[axis] = _Tap(offset + position)
    return taps


def _stack(equation, operand, result):
    rank, new = len(equation.invars[operand].aval.shape), equation.params["axis"]
    return [_Tap(axis if axis < new else axis + 1) for axis in range(rank)]


def _unstack(equation, operand, result):
    return _without(equation.invars[operand].aval.shape, (equation.params["axis"],))


def _reduction(equation, operand, result):
    return _without(equation.invars[operand].aval.shape, equation.params["axes"])


def _squeeze(equation, operand, result):
    return _without(equation.invars[operand].aval.shape, equation.params["dimensions"])


def _without(shape, removed):
    left = itertools.count()
    return [None if axis in removed else _Tap(next(left)) for axis in range(len(shape))]


def _slice(equation, operand, result):
    starts = equation.params["start_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    return [
        _Tap(axis, _exact(stride), _exact(start), _exact(start))
        for axis, (start, stride) in enumerate(zip(starts, strides, strict=True))
    ]


def _dynamic_slice(equation, operand, result):
    # The start is clipped: an axis that is taken whole stays where it is.
    return _elementwise(equation, operand, result) if operand == 0 else []


def _pad(equation, operand, result):
    if operand == 1:
        return []
    taps = []
    for axis, (low, _, interior) in enumerate(equation.params["padding_config"]):
        shift = _exact(-low, interior + 1)
        taps.append(_Tap(axis, _exact(1, interior + 1), shift, shift))
    return taps


def _concatenate(equation, operand, result):
    joined = equation.params["dimension"]
    shapes = [atom.aval.shape for atom in equation.invars]
    before = sum(shape[joined] for shape in shapes[:operand])
    return _shifted(len(shapes[operand]), joined, -before)


def _split(equation, operand, result):
    before = sum(equation.params["sizes"][:result])
    rank = len(equation.invars[operand].aval.shape)
    return _shifted(rank, equation.params["axis"], before)


def _shifted(rank, shifted_axis, shift):
    shifts = [_exact(shift if axis == shifted_axis else 0) for axis in range(rank)]
    return [_Tap(axis, Fraction(1), by, by) for axis, by in enumerate(shifts)]


def _transpose(equation, operand, result):
    permutation = list(equation.params["permutation"])
    return [_Tap(permutation.index(axis)) for axis in range(len(permutation))]


def _broadcast(equation, operand, result):
    if operand > 0:
        return []
    out = equation.outvars[result].aval.shape
    shape = equation.invars[operand].aval.shape
    places = [int(axis) for axis in equation.params["broadcast_dimensions"]]
    return [
        _Tap(place) if size == out[place] else None
        for size, place in zip(shape, places, strict=True)
    ]


def _reshape(equation, operand, result):
    """An axis that stays, or is cut into several, is followed; merged ones are not."""
    old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    taps: list[_Tap | None] = [None] * len(old)
    if 0 in old:
        return taps
    if old == new:
        return [_Tap(axis) for axis in range(len(old))]
    old_axes = [axis for axis, size in enumerate(old) if size != 1]
    new_axes = [axis for axis, size in enumerate(new) if size != 1]
    # Both lists fall into the same runs: axes next to each other, of equal product.
    while old_axes:
        run, counterpart = [old_axes.pop(0)], [new_axes.pop(0)]
        while (a := _volume(old, run)) != (b := _volume(new, counterpart)):
            if a < b:
                run.append(old_axes.pop(0))
            else:
                counterpart.append(new_axes.pop(0))
        if len(run) == 1:
            inner = Fraction(_volume(new, counterpart[1:]))
            taps[run[0]] = _Tap(counterpart[0], inner, Fraction(0), inner - 1)
    return taps


def _volume(shape, axes):
    return math.prod(shape[axis] for axis in axes)


_ELEMENTWISE = (
    "abs", "add", "add_any", "and", "atan2", "cbrt", "ceil", "clamp",
    "convert_element_type", "copy", "copy_p", "cos", "cosh", "div", "eq", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow",
    "is_finite", "le", "log", "log1p", "log2", "logistic", "lt", "max", "min", "mul",
    "name", "ne", "neg", "not", "or", "pow", "reduce_precision", "rem", "reshard",
    "round", "rsqrt", "select_n", "sharding_constraint", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "sub", "tan", "tanh", "xor",
)  # fmt: skip
_REDUCTIONS = ("sum", "max", "min", "prod", "and", "or")

_Rule = Callable[[Any, int, int], _Taps]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **{f"reduce_{name}": _reduction for name in _REDUCTIONS},
    "argmax": _reduction,
    "argmin": _reduction,
    "reduce_window_max": _pooling,
    "reduce_window_min": _pooling,
    "reduce_window_sum": _pooling,
    "conv_general_dilated": _convolution,
    "dot_general": _product,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "transpose": _transpose,
    "unstack": _unstack,
}
