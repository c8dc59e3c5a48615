"""Resolves a config file, command line or dictionary to a valid config.

Every error is one sentence, raised before any device is touched.
"""

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any

from resnet_jax.config.checks import refuse_contradictions
from resnet_jax.config.detection import DetectionConfig
from resnet_jax.config.files import run_config_file
from resnet_jax.config.schema import Config, fields, flatten
from resnet_jax.errors import UserError
from resnet_jax.options import Field, check
from resnet_jax.storage import locate


def load_config(
    spec: str, overrides: Mapping[str, Any] | None = None, schema: Any = Config
) -> Any:
    """Reads a config file and resolves it.

    Args:
      spec: the path of a file that defines ``get_config(arg)``, or a name of
        ``list_configs``; with ``:ARG`` after it if there is an argument.
      overrides: dotted field names to values, as text if you like.
      schema: ``Config``, or ``DetectionConfig`` for a detector.

    Raises:
      UserError: the file or a value is wrong.
    """
    values = {
        name: parse(name, text, schema) for name, text in (overrides or {}).items()
    }
    return resolve(run_config_file(spec, values), schema)


def override(config: Any, overrides: Mapping[str, str]) -> Any:
    """A config with some fields replaced.

    Args:
      config: stays as it is.
      overrides: dotted field names to values, as text if you like.

    Raises:
      UserError: a field or a value is wrong.
    """
    schema = type(config)
    values = {name: parse(name, text, schema) for name, text in overrides.items()}
    return resolve(flatten(config) | values, schema)


def resolve(config: Any, schema: Any = Config) -> Any:
    """The typed, valid config of a run.

    Args:
      config: a ConfigDict, a nested dictionary, or a config of the schema, which is
        returned as it is.
      schema: ``Config``, or ``DetectionConfig`` for a detector.

    Raises:
      UserError: an unknown field, a wrong type, a value out of range or a
        contradiction, in one sentence.
    """
    if isinstance(config, schema):
        return config
    if isinstance(config, str):
        raise UserError(
            f"a config is an object, not the text {config!r}: take the one that "
            "resnet_jax.load_config returns"
        )
    given = flatten(config)
    _refuse_other_schema(given, schema)
    if given.get("model.conv_algorithm") == "pointwise":  # of older runs
        given["model.conv_algorithm"] = "auto"
    for name, old in _REMOVED.items():
        if given.pop(name, old[0]) not in old:
            raise UserError(
                f"config field {name} no longer exists; only runs with "
                f"{' or '.join(map(repr, old))} can be loaded"
            )
    for name in given:
        _known_field(name, schema)
    values = {}
    for name, field in fields(schema).items():
        values[name] = _check(field, given.get(name, field.default))
    for name in ("data.path", "data.data_dir"):
        # Absolute, so that other commands find the data from any folder.
        if values.get(name) is not None:
            values[name] = os.fspath(locate(values[name]))
    resolved = _build(schema, values)
    refuse_contradictions(resolved)
    return resolved


def _refuse_other_schema(given: Mapping[str, Any], schema: type) -> None:
    sections = {name.partition(".")[0] for name in given}
    if schema is Config and "detector" in sections:
        raise UserError(
            "this is the config of a detector: use the commands of resnet-jax detect, "
            "or resnet_jax.detection in Python"
        )
    if schema is DetectionConfig and "loss" in sections:
        raise UserError(
            "this is the config of a classifier, not of a detector: use resnet-jax "
            "without detect, or resnet_jax itself in Python"
        )


_REMOVED = {
    "model.norm_arithmetic": ("wide",),
    "model.norm_variance": ("two_pass", "fast"),
    "model.stem_form": ("conv",),
}
"""Fields of older runs, and values that differ by rounding from what is done now."""


def _build(cls: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A (nested) dataclass from dotted names and values."""
    return cls(
        **{
            field.name: _build(field.type, values, f"{prefix}{field.name}.")
            if dataclasses.is_dataclass(field.type)
            else values[prefix + field.name]
            for field in dataclasses.fields(cls)
        }
    )


def _known_field(name: str, schema: type) -> Field:
    known_fields = fields(schema)
    if name in known_fields:
        return known_fields[name]
    inside = [known for known in known_fields if known.startswith(name + ".")]
    if inside:
        raise UserError(
            f"config field {name} is a section; set one of {', '.join(inside)}"
        )
    section = name.rpartition(".")[0]
    siblings = _siblings(section, schema)
    close = nearest_field(name, schema)
    listed = "see train --help"
    if section and siblings:
        listed = f"{section} has {', '.join(siblings)}"
    hint = f"did you mean {close}?" if close else listed
    raise UserError(f"unknown config field {name}; {hint}")


def nearest_field(name: str, schema: type = Config) -> str | None:
    """The field that a misspelt name, or the name of another library, may mean."""
    section, _, key = name.rpartition(".")
    siblings = _siblings(section, schema)
    in_section = difflib.get_close_matches(key, siblings, n=1, cutoff=0.75)
    close = [siblings[other] for other in in_section]
    close += [_ELSEWHERE[key]] if _ELSEWHERE.get(key) in fields(schema) else []
    close += [known for known in fields(schema) if known.rpartition(".")[2] == key]
    close += [siblings[other] for other in difflib.get_close_matches(key, siblings, 1)]
    close += difflib.get_close_matches(name, fields(schema), n=1, cutoff=0.8)
    return close[0] if close else None


def _siblings(section: str, schema: type) -> dict[str, str]:
    """The fields of a section: full names by their last parts."""
    return {
        field.rpartition(".")[2]: field
        for field in fields(schema)
        if field.rpartition(".")[0] == section
    }


_ELSEWHERE = {
    "amp": "model.dtype",
    "arch": "model.name",
    "b": "training.global_batch_size",
    "batch_size": "training.global_batch_size",
    "batchsize": "training.global_batch_size",
    "data": "data.path",
    "data_path": "data.path",
    "dataset": "data.name",
    "ema": "optimizer.ema_decay",
    "epoch": "training.epochs",
    "lr": "optimizer.learning_rate",
    "model": "model.name",
    "net": "model.name",
    "num_workers": "data.num_threads",
    "opt": "optimizer.kind",
    "optimizer": "optimizer.kind",
    "pretrained": "model.weights",
    "sched": "schedule.kind",
    "scheduler": "schedule.kind",
    "smoothing": "loss.label_smoothing",
    "step": "training.steps",
    "wd": "optimizer.weight_decay",
    "workers": "data.num_threads",
}
"""What timm, torchvision and others call some fields."""


def parse(name: str, text: str, schema: type = Config) -> Any:
    """The value of a field from text, as on the command line.

    Raises:
      UserError: the field is unknown, or the value is wrong.
    """
    field = _known_field(name, schema)
    return _check(field, _from_text(field, text))


def _check(field: Field, value: Any) -> Any:
    return check(dataclasses.replace(field, name=f"config field {field.name}"), value)


def _from_text(field: Field, text: str) -> Any:
    """A value from text, or the text itself if it has no such form."""
    if not isinstance(text, str):  # from a notebook
        return text
    kinds = str(field.annotation)
    if text == "None":
        return None
    if "str" in kinds and "tuple" not in kinds:
        return text
    text = text.strip()
    if "bool" in kinds:
        return {"true": True, "false": False}.get(text.lower(), text)
    if "tuple" not in kinds:
        return _number(text)
    inside = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text
    items = [item.strip() for item in inside.split(",")]
    if not items[-1]:
        items.pop()
    if "str" in kinds:
        return tuple(item for item in items if item)
    values = tuple(map(_number, items))
    return text if not text or str in map(type, values) else values


def _number(text: str) -> int | float | str:
    """A number; a whole one such as 64e3 as an integer; other text stays text."""
    if len(text) > _MOST_DIGITS:
        return text
    with contextlib.suppress(ValueError):
        return int(text, base=0)
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if value.is_integer() else value


_MOST_DIGITS = 1000
"""Longer text is no number."""
