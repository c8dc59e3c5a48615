"""The options of nets, each declared once.

``create_model``, the ``model`` section of a config, ``--help`` and the checks
of values all come from ``ModelOptions``. This module does without jax, so that
``--help`` need not wait for it.
"""

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from resnet_jax.errors import UserError

SHORTCUTS = (
    *("A", "B", "C", "pooled", "none"),
    *("scaled", "scaled_both", "exclusive_gate", "shortcut_gate", "dropout"),
)
STRIDE_VERSIONS = ("v1", "v1.5")
NORMALIZATIONS = ("batch", "none")
INITIALIZATIONS = ("he", "he_fan_in", "xavier", "normal_0.01")
ALGORITHMS = ("auto", "xla", "packed", "products", "patches")

BELOW_ONE = 0.999999
"""The largest rate or decay: in float32, closer ones round to 1."""
MOST_ITEMS = 1000
"""Most items of a tuple."""
MOST_CHARACTERS = 4096
"""Longest string: that of a path on Linux."""


def option(default: Any, meaning: str, **limits: Any) -> Any:
    """A dataclass field with its default and the attributes of ``Field``."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, **limits})


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The options of ``create_model`` that a config can set."""

    name: str = option("cifar_resnet20", "a name of resnet_jax.list_models()")
    shortcut: str | None = option(
        None,
        "A, B, C, pooled (ResNet-D) or none; or a shortcut that He et al. 2016 compare "
        "with the identity; None: the net's own",
        choices=SHORTCUTS,
    )
    stride_version: str | None = option(
        None,
        "where a bottleneck strides: v1 the first 1x1 (paper), v1.5 the 3x3; None: the "
        "net's own",
        choices=STRIDE_VERSIONS,
    )
    block_convs: int | None = option(
        None,
        "3x3 convolutions of a basic block; None: the net's own",
        at_least=1,
        at_most=64,
    )
    squeeze_excite: bool | None = option(
        None, "gate residual functions by their channel means; None: the net's own"
    )
    zero_init_last: bool | None = option(
        None,
        "start the last normalisation of each block with scale zero; None: the net's "
        "own",
    )
    stochastic_depth_rate: float | None = option(
        None,
        "probability with which training drops the last block, growing linearly from "
        "the first; None: the net's own",
        at_least=0,
        at_most=BELOW_ONE,
    )
    dropout_rate: float | None = option(
        None,
        "rate of the dropout that the net defines; None: the net's own",
        at_least=0,
        at_most=BELOW_ONE,
    )
    gate_bias: float | None = option(
        None,
        "initial bias of the gates of a highway net or gated shortcut; None: the net's "
        "own",
        at_least=-1000,
        at_most=1000,
    )
    normalization: str | None = option(
        None,
        "batch; or none for a residual or plain net without normalisation, whose "
        "convolutions have biases; None: the net's own",
        choices=NORMALIZATIONS,
    )
    initialization: str | None = option(
        None,
        "of kernels: he (fan-out), he_fan_in, xavier or normal_0.01; a residual or "
        "plain net's classifier keeps its own; None: the net's own",
        choices=INITIALIZATIONS,
    )
    dtype: str = option(
        "float32",
        "dtype of convolutions and maps; everything else is float32",
        choices=("float32", "bfloat16"),
    )
    batch_norm_groups: int = option(
        1,
        "parts of the global batch with separate statistics",
        at_least=1,
        at_most=2**20,
    )
    batch_norm_momentum: float = option(
        0.9,
        "decay of the running statistics (torch's 0.1 is 0.9)",
        at_least=0,
        at_most=BELOW_ONE,
    )
    batch_norm_epsilon: float = option(
        1e-5, "added to the variance", at_least=0, at_most=1
    )
    fused_norm: bool | None = option(
        None,
        "in training, gradients by hand of normalisation, addition, ReLU and the "
        "stem's pooling; false: automatic ones, forward mode too; None: not on TPUs",
    )
    scan: bool | None = option(
        None,
        "run equal blocks as one loop, which compiles in less time; None: for nets too "
        "deep to unroll",
    )
    remat: bool = option(
        False, "recompute the inside of blocks for the gradient, to save memory"
    )
    conv_algorithm: str = option(
        "auto",
        "how to compute convolutions: auto is the faster one for the device",
        choices=ALGORITHMS,
    )


@dataclasses.dataclass(frozen=True)
class Field:
    """One declared option.

    Attributes:
      name: its dotted name.
      annotation: its type.
      default: its default value.
      meaning: one line of documentation; it says what None means.
      choices: the valid strings.
      at_least, at_most: the smallest and largest valid number, also of a tuple's items;
        every number has both.
      operational: changes where or how fast a run happens but not its result, so it
        may change when a run continues.
    """

    name: str
    annotation: Any
    default: Any
    meaning: str
    choices: Sequence[str] | None = None
    at_least: float = -math.inf
    at_most: float = math.inf
    operational: bool = False


def declared(cls: type, prefix: str = "") -> Iterator[Field]:
    """The options of a (nested) dataclass, in order."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, annotation = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(annotation):
            yield from declared(typing.cast(type, annotation), name + ".")
        else:
            yield Field(name, annotation, field.default, **field.metadata)


def check(field: Field, value: Any) -> Any:
    """The value in the field's type.

    Raises:
      UserError: a wrong type, or a value that is not valid, in one sentence.
    """
    converted = _converted(field.annotation, value)
    if converted is _WRONG:
        raise UserError(
            f"{field.name} takes {describe_type(field.annotation)}, not {_shown(value)}"
        )
    if field.choices and converted is not None and converted not in field.choices:
        close = difflib.get_close_matches(str(converted)[:100], field.choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            f"{field.name} is one of {', '.join(field.choices)}, "
            f"not {_shown(converted)}{hint}"
        )
    items = converted if isinstance(converted, tuple) else (converted,)
    if len(items) > MOST_ITEMS:
        raise UserError(
            f"{field.name} takes at most {MOST_ITEMS} items, not {len(items)}"
        )
    for item in items:
        if isinstance(item, str):
            _check_text(field, item)
        is_number = isinstance(item, (int, float)) and not isinstance(item, bool)
        # NaN fails every comparison.
        if is_number and not field.at_least <= item <= field.at_most:
            raise UserError(
                f"{field.name} must be {describe_range(field)}, not {_shown(value)}"
            )
    return converted


def _check_text(field: Field, text: str) -> None:
    if not text:
        raise UserError(f"{field.name} must not be an empty string")
    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"{field.name} takes at most {MOST_CHARACTERS} characters, not {len(text)}"
        )
    if "\0" in text:
        raise UserError(f"{field.name} must not contain a NUL character")


def _shown(value: Any) -> str:
    """A value in an error message, cut if it is long."""
    if isinstance(value, int) and 1e15 < abs(value) < 1.7e308:
        return f"{value:g}"
    try:
        text = repr(value)
    except ValueError:
        return "one of more than 4300 digits, which Python does not print"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


_WRONG = object()


def _converted(annotation: Any, value: Any) -> Any:
    """The value in the annotated type, or _WRONG; nothing is guessed."""
    if isinstance(annotation, types.UnionType):
        inner, _ = typing.get_args(annotation)
        return None if value is None else _converted(inner, value)
    if typing.get_origin(annotation) is tuple:
        if not isinstance(value, (tuple, list)):
            return _WRONG
        items = [_converted(typing.get_args(annotation)[0], item) for item in value]
        return _WRONG if _WRONG in items else tuple(items)
    if annotation in (bool, str) or isinstance(value, bool):
        return value if type(value) is annotation else _WRONG
    kind = numbers.Integral if annotation is int else numbers.Real
    if not isinstance(value, kind):
        return _WRONG
    try:
        return annotation(value)
    except OverflowError:
        return value  # an integer beyond all floats, and all limits


def describe_type(annotation: Any) -> str:
    """A type in words, for error messages and --help."""
    if isinstance(annotation, types.UnionType):
        inner, _ = typing.get_args(annotation)
        return f"{describe_type(inner)} or None"
    if typing.get_origin(annotation) is tuple:
        inner = typing.get_args(annotation)[0]
        kind = {int: "integers", float: "numbers", str: "strings"}[inner]
        return f"a tuple of {kind}"
    words = {int: "an integer", float: "a number", bool: "true or false"}
    return words.get(annotation, "a string")


def describe_range(field: Field) -> str:
    """The valid numbers of a field in words: ``from 1 to 1,000``."""
    return f"from {_bound(field.at_least)} to {_bound(field.at_most)}"


def _bound(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
