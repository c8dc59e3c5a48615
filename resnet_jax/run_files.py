"""What the JSON files of a run hold for their readers, checked when they are read."""

import json
from collections.abc import Mapping
from typing import Any

from resnet_jax.errors import UserError

RESTORE = "restore it from a copy, or give another --workdir"

_HUGE = 1e300
NUMBER, _COUNT = "a number", "a number above 0"
_TYPES: dict[str, Any] = {
    NUMBER: (int, float),
    _COUNT: (int, float),
    "a text": str,
    "a list": list,
    "an object": dict,
}
CONFIG = {"config": "an object"}
IDENTITY = {"kind": "a text", "class_names": "a list", "counts": "an object"}
ANY_RESULT = {
    **dict.fromkeys(("model", "data", "command", "finished"), "a text"),
    **dict.fromkeys(("test_error", "train_error", "seconds", "epoch"), NUMBER),
    **dict.fromkeys(("step", "parameters", "multiply_adds"), NUMBER),
    "test_count": _COUNT,
    "environment": "an object",
}
_RESULT = ANY_RESULT | dict.fromkeys(
    ("test_errors", "seed", "training_examples", "global_batch_size"), NUMBER
)
_HOLDOUT = ("holdout_error", "holdout_errors", "holdout_count")
_RESULT_OF_SEEDS = ANY_RESULT | {
    "summary": "a text",
    "runs": "an object",
    "failures": "an object",
}
DETECTION_RESULT = {
    **dict.fromkeys(("model", "command", "finished"), "a text"),
    **dict.fromkeys(("step", "epoch", "seconds", "parameters"), NUMBER),
    **dict.fromkeys(("global_batch_size", "train_loss"), NUMBER),
    "environment": "an object",
}
DETECTION_ROW = dict.fromkeys(
    ("step", "epoch", "learning_rate", "train_loss", "seconds"), NUMBER
)
ROW = DETECTION_ROW | {"train_error": NUMBER}


def parse(where: str, text: str, expected: Mapping[str, str]) -> dict[str, Any]:
    """A JSON object that holds what its readers expect.

    Raises:
      UserError: it is damaged; ``where`` names it.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged: {error}; {RESTORE}") from error
    check(where, content, expected)
    return content


def check_result(where: str, result: dict[str, Any]) -> None:
    """Checks the content of result.json, of one run or of several seeds.

    Raises:
      UserError: it is damaged; ``where`` names it.
    """
    runs = result.get("runs")
    if runs is None:
        _check_run(where, result)
        return
    check(where, result, _RESULT_OF_SEEDS)
    for name, run in runs.items():
        _check_run(f"{name} in {where}", run)


def _check_run(where: str, result: Any) -> None:
    """Checks the result of one run, with the figures that only some runs have."""
    check(where, result, _RESULT)
    some = {"test_top5_error", "train_skipped"} & result.keys()
    if result.get("images_per_second") is not None:
        some.add("images_per_second")
    if not result.keys().isdisjoint(_HOLDOUT):
        some.update(_HOLDOUT)
    check(where, result, dict.fromkeys(some, NUMBER))


def check(where: str, content: Any, expected: Mapping[str, str]) -> None:
    """Raises UserError unless an object holds fields of the expected kinds."""
    if not isinstance(content, dict):
        raise UserError(f"{where} is damaged: it is not a JSON object; {RESTORE}")
    for name, kind in expected.items():
        value: Any = content.get(name)
        fits = isinstance(value, _TYPES[kind]) and not isinstance(value, bool)
        if fits and kind in (NUMBER, _COUNT):
            low = 0 if kind == _COUNT else -_HUGE
            fits = low < value < _HUGE
        if not fits:
            found = f"{value!r:.40}" if name in content else "missing"
            raise UserError(
                f"{where} is damaged: {name} is {found}, expected {kind}; {RESTORE}"
            )
