"""Resolves a config file, command line or dictionary to a valid ``Config``.

Every error is one sentence, raised before any device is touched.
"""

import ast
import dataclasses
import difflib
import inspect
import os
import runpy
import traceback
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnet_jax.config.checks import refuse_contradictions
from resnet_jax.config.schema import Config, fields, flatten
from resnet_jax.errors import UserError
from resnet_jax.models.options import Field, check
from resnet_jax.storage import locate


def load_config(spec: str, overrides: Mapping[str, str] | None = None) -> Config:
    """Reads a config file and resolves it.

    Args:
      spec: ``PATH`` or ``PATH:ARG``; the file defines ``get_config(arg)``.
      overrides: dotted field names to values as text, as on the command line.

    Raises:
      UserError: the file or a value is wrong.
    """
    return override(_run_config_file(spec), overrides or {})


def override(config: Any, overrides: Mapping[str, str]) -> Config:
    """A config with some fields replaced.

    Args:
      config: whatever ``resolve`` takes; stays as it is.
      overrides: dotted field names to values as text, as on the command line.

    Raises:
      UserError: a field or a value is wrong.
    """
    values = flatten(config)
    for name, text in overrides.items():
        values[name] = _parse(_known_field(name), text)
    return resolve(values)


def resolve(config: Any) -> Config:
    """The typed, valid config of a run.

    Args:
      config: a ConfigDict, a nested dictionary, or a Config, which is returned as
        it is.

    Raises:
      UserError: an unknown field, a wrong type, a value out of range or a
        contradiction, in one sentence.
    """
    if isinstance(config, Config):
        return config
    given = flatten(config)
    for name, default in _REMOVED.items():
        if given.pop(name, default) != default:
            raise UserError(
                f"config field {name} no longer exists; only its old default, "
                f"{default!r}, can be loaded"
            )
    for name in given:
        _known_field(name)
    values = {}
    for name, field in fields().items():
        named = dataclasses.replace(field, name=f"config field {name}")
        values[name] = check(named, given.get(name, field.default))
    for name in ("data.path", "data.data_dir"):
        # Absolute, so that other commands find the data from any folder.
        if values[name] is not None:
            values[name] = os.fspath(locate(values[name]))
    resolved = _build(Config, values)
    refuse_contradictions(resolved)
    return resolved


_REMOVED = {"model.norm_arithmetic": "wide", "model.stem_form": "conv"}
"""Fields of older runs and their defaults."""


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


def _run_config_file(spec: str) -> Any:
    import ml_collections

    before, _, arg = spec.partition(".py:")
    path = Path(before + ".py" if arg else spec)
    if not path.is_file():
        raise UserError(
            f"config file {path} does not exist; give the path of a file such as "
            "configs/digits.py or configs/cifar10.py:cifar_resnet56"
        )
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise UserError(f"{path} defines no get_config(); see configs/digits.py")
        takes_arg = bool(inspect.signature(get_config).parameters)
        if arg and not takes_arg:
            raise UserError(f"{path}: its get_config takes no argument, not {arg!r}")
        config = get_config(arg) if arg else get_config()
    except UserError:
        raise
    except Exception as error:
        message = str(error).strip().split("\n")[0]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {message}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"{path}: get_config must return a ConfigDict made by default_config(), "
            f"not {type(config).__name__}"
        )
    return config


def _known_field(name: str) -> Field:
    schema = fields()
    if name in schema:
        return schema[name]
    inside = [known for known in schema if known.startswith(name + ".")]
    if inside:
        raise UserError(
            f"config field {name} is a section; set one of {', '.join(inside)}"
        )
    section, _, key = name.rpartition(".")
    siblings = {
        field.name.rpartition(".")[2]: field.name
        for field in schema.values()
        if field.name.rpartition(".")[0] == section
    }
    close = [siblings[other] for other in difflib.get_close_matches(key, siblings, 1)]
    close += [known for known in schema if known.endswith(f".{key}")]
    close += difflib.get_close_matches(name, schema, n=1, cutoff=0.8)
    listed = f"{section} has {', '.join(siblings)}" if siblings else "see train --help"
    hint = f"did you mean {close[0]}?" if close else listed
    raise UserError(f"unknown config field {name}; {hint}")


def _parse(field: Field, text: str) -> Any:
    """A command-line value, converted from text but not checked."""
    if text == "None":
        return None
    if "bool" in str(field.annotation) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if typing.get_origin(field.annotation) is tuple and "str" in str(field.annotation):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if "str" in str(field.annotation):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    if "tuple" in str(field.annotation) and not isinstance(value, (tuple, list)):
        value = (value,)
    if "int" in str(field.annotation):
        value = _integral(value)
    return value


def _integral(value: Any) -> Any:
    """Converts a whole float such as 64e3 to an integer."""
    if isinstance(value, (tuple, list)):
        return tuple(_integral(item) for item in value)
    return int(value) if isinstance(value, float) and value.is_integer() else value
