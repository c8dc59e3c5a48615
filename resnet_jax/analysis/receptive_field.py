"""The pixels of the image that each module of a net sees, from the traced program.

Axes 1 and 2 of an array are the image's height and width. An operation without a rule
here counts as one that sees the whole image.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from resnet_jax.analysis.complexity import Path, Program, inner_programs


class Window(NamedTuple):
    """The pixels along one axis: position i sees low + i stride to high + i stride."""

    stride: int
    low: int
    high: int


class View(NamedTuple):
    """What an array sees along one axis of the image.

    Attributes:
      window: moves with the position; None if every position sees the whole axis.
      context: whether every position also sees the whole axis, through a gate.
    """

    window: Window | None
    context: bool = False


Reach = tuple[View, View] | None
"""Along height and width; None for an array that does not depend on the image."""

_WHOLE: Reach = (View(None), View(None))


class Output(NamedTuple):
    """A module's output: its shape for one image, its reach, and how often it runs."""

    shape: tuple[int, ...] | None
    reach: Reach
    repeats: int


def module_outputs(program: Program) -> dict[Path, Output]:
    """The output of each module of a program; of a loop, that of the last round."""
    outputs: dict[Path, Output] = {}
    pixel = View(Window(1, 0, 0))
    variables: list[Reach] = [None] * (len(program.jaxpr.invars) - 1)
    _follow(program, program.jaxpr, [*variables, (pixel, pixel)], 1, outputs)
    return outputs


def _follow(
    program: Program,
    jaxpr: Any,
    inputs: Sequence[Reach],
    times: int,
    outputs: dict[Path, Output],
) -> list[Reach]:
    """The reaches of a jaxpr's results; ``times`` is how often the jaxpr runs."""
    reaches = dict(zip(jaxpr.invars, inputs, strict=True))

    def reach(atom):
        # Literals have a value and no name; constants are not among the inputs.
        return None if hasattr(atom, "val") else reaches.get(atom)

    for equation in jaxpr.eqns:
        operands = [reach(atom) for atom in equation.invars]
        path = program.returned_by(equation)
        if path is not None:
            shape = equation.outvars[0].aval.shape[1:]
            outputs[path] = Output(shape, operands[0], times)
        inner = list(inner_programs(equation))
        if not any(operands):
            results: list[Reach] = [None] * len(equation.outvars)
        elif equation.primitive.name == "scan":
            results = _loop(program, equation, inner[0], operands, times, outputs)
        elif equation.primitive.name == "cond":
            branches = [
                _follow(program, branch, operands[1:], times, outputs)
                for branch in inner
            ]
            results = [_joined([operands[0], *r]) for r in zip(*branches, strict=True)]
        elif len(inner) == 1 and len(inner[0].invars) == len(operands):
            results = _follow(program, inner[0], operands, times, outputs)
        elif inner:
            results = [_WHOLE] * len(equation.outvars)
        else:
            passed = [_passed(equation, i, reach) for i, reach in enumerate(operands)]
            results = [_joined(passed)] * len(equation.outvars)
        reaches.update(zip(equation.outvars, results, strict=True))
    return [reach(atom) for atom in jaxpr.outvars]


def _loop(program, equation, body, operands, times, outputs):
    """A scan over constants, carried and stacked operands, in this order."""
    # Stacked arrays have one axis more outside the body than inside. jax's own counts
    # of constants and carried operands differ between versions.
    ranks = [
        [len(outer.aval.shape) == len(own.aval.shape) for outer, own in pairs]
        for pairs in (
            zip(equation.invars, body.invars, strict=True),
            zip(equation.outvars, body.outvars, strict=True),
        )
    ]
    num_carried = sum(ranks[1])
    first = sum(ranks[0]) - num_carried
    stacked = [reach and _WHOLE for reach in operands[first + num_carried :]]
    carried, length = operands[first : first + num_carried], equation.params["length"]
    for _ in range(length):
        before = carried
        given = [*operands[:first], *carried, *stacked]
        results = _follow(program, body, given, times * length, outputs)
        carried = results[:num_carried]
        if carried == before:
            break
    return carried + [reach and _WHOLE for reach in results[num_carried:]]


def _joined(reaches: Iterable[Reach]) -> Reach:
    """The reach of an array that depends on all of several."""
    seen = [reach for reach in reaches if reach is not None]
    if not seen:
        return None
    height, width = (_joined_views(views) for views in zip(*seen, strict=True))
    return height, width


def _joined_views(views: Sequence[View]) -> View:
    windows = [view.window for view in views if view.window is not None]
    if len({window.stride for window in windows}) != 1:
        return View(None)
    low = min(window.low for window in windows)
    high = max(window.high for window in windows)
    context = len(windows) < len(views) or any(view.context for view in views)
    return View(Window(windows[0].stride, low, high), context)


def _passed(equation: Any, operand: int, reach: Reach) -> Reach:
    """The reach that an operation passes on from one operand to its results."""
    if reach is None:
        return None
    taps = [_tap(equation, operand, axis) for axis in (1, 2)]
    height, width = (_tapped(v, tap) for v, tap in zip(reach, taps, strict=True))
    return height, width


def _tapped(view: View, tap: tuple[int, int, int] | None) -> View:
    window = view.window
    if window is None or tap is None:
        return View(None)
    scale, first, last = tap
    low = window.low + window.stride * first
    high = window.high + window.stride * last
    return View(Window(window.stride * scale, low, high), view.context)


_NHWC = (0, 3, 1, 2)
_SAME = (1, 0, 0)
_KEEPS_AXES = frozenset((
    "abs", "add", "add_any", "and", "clamp", "convert_element_type", "copy", "cos",
    "div", "eq", "erf", "exp", "expm1", "ge", "gt", "integer_pow", "is_finite", "le",
    "log", "log1p", "logistic", "lt", "max", "min", "mul", "name", "ne", "neg", "not",
    "optimization_barrier", "or", "pow", "reduce_precision", "rsqrt", "select_n",
    "sharding_constraint", "sign", "sin", "sqrt", "square", "stop_gradient", "sub",
    "tanh", "xor",
))  # fmt: skip


def _tap(equation: Any, operand: int, axis: int) -> tuple[int, int, int] | None:
    """Position i needs the operand's i * scale + first to i * scale + last.

    Returns:
      (scale, first, last), or None if each position needs the whole axis.
    """
    name, params = equation.primitive.name, equation.params
    shape = equation.invars[operand].aval.shape
    out = equation.outvars[0].aval.shape
    if len(shape) <= axis or len(out) <= axis:
        return None
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        plain = set(params["lhs_dilation"]) == {1} and operand == 0
        if not plain or (numbers.lhs_spec, numbers.out_spec) != (_NHWC, _NHWC):
            return None
        size = equation.invars[1].aval.shape[numbers.rhs_spec[axis + 1]]
        low, reach = params["padding"][axis - 1][0], params["rhs_dilation"][axis - 1]
        return params["window_strides"][axis - 1], -low, (size - 1) * reach - low
    if name.startswith("reduce_window"):
        if params["base_dilation"][axis] != 1:
            return None
        low, reach = params["padding"][axis][0], params["window_dilation"][axis]
        last = (params["window_dimensions"][axis] - 1) * reach - low
        return params["window_strides"][axis], -low, last
    if name == "slice":
        start = params["start_indices"][axis]
        return (params["strides"] or [1] * len(shape))[axis], start, start
    if name == "pad":
        low, _, interior = params["padding_config"][axis]
        return None if interior or operand else (1, -low, -low)
    same = axis < _first_changed(equation, operand) and shape[axis] == out[axis]
    return _SAME if same else None


def _first_changed(equation: Any, operand: int) -> int:
    """The first axis of an operand that an operation moves, merges or sums over."""
    name, params = equation.primitive.name, equation.params
    shape = equation.invars[operand].aval.shape
    order: Sequence[int] = range(len(shape))
    if name in _KEEPS_AXES:
        return len(shape)
    if name == "concatenate":
        return params["dimension"]
    if name == "squeeze":
        return min(params["dimensions"])
    if name in ("argmax", "argmin") or name.startswith("reduce_"):
        return min(params["axes"], default=len(shape))
    if name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        return 0 if operand or batch else min(contracted)
    if name == "reshape":
        order = equation.outvars[0].aval.shape
        shape = (*shape, *[0] * (len(order) - len(shape)))
        equal = [a == b for a, b in zip(shape, order, strict=False)]
        return [*equal, False].index(False)
    if name in ("transpose", "broadcast_in_dim"):
        order = params.get("permutation", params.get("broadcast_dimensions"))
        return [*(i == axis for i, axis in enumerate(order)), False].index(False)
    return 0
