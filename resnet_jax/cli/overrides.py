"""``--config.FIELD=VALUE`` arguments, and their help."""

import argparse
import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from resnet_jax.config import (
    Config,
    DetectionConfig,
    describe_range,
    describe_type,
    fields,
    load_config,
)
from resnet_jax.errors import UserError

PREFIX = "--config."
CONFIG = "a config file: its name in `resnet-jax configs` or its path, and its argument"
"""Help of --config."""


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Parses the arguments that argparse did not recognise.

    Returns:
      Dotted field name to text.

    Raises:
      UserError: an argument is not an override, or lacks a value.
    """
    overrides = {}
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith(PREFIX):
            raise UserError(f"unknown argument {argument}; see --help")
        name, equals, text = argument.removeprefix(PREFIX).partition("=")
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UserError(f"{argument} needs a value: {argument}=VALUE")
            text = waiting.pop(0)
        overrides[name] = text
    return overrides


def chosen_config(options: argparse.Namespace, schema: Any = Config) -> Any:
    """The config of a command that trains: the one given, or that of its workdir.

    Raises:
      UserError: neither is there, or the config is wrong.
    """
    overrides = parse_overrides(options.rest)
    if options.config is not None:
        return load_config(options.config, overrides, schema)
    from resnet_jax.workdir import Workdir

    present = Workdir(options.workdir, schema).read_config()
    if present is None or overrides:
        raise UserError(
            "give --config NAME or FILE.py; only to continue a run, without overrides, "
            "it is not needed"
        )
    return present


def join_overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``--config.FIELD VALUE`` as ``--config.FIELD=VALUE``.

    Otherwise argparse takes the value for an argument of the command.
    """
    joined: list[str] = []
    for argument in arguments:
        last = joined[-1] if joined else ""
        is_open = last.startswith(PREFIX) and "=" not in last
        if is_open and not argument.startswith("--"):
            joined[-1] = f"{last}={argument}"
        else:
            joined.append(argument)
    return joined


def as_flags(sentence: str) -> str:
    """A sentence with its config fields as flags: ``--config.data.path``."""
    known = {*fields(), *fields(DetectionConfig)}
    names = sorted(map(re.escape, known), key=len, reverse=True)
    dotted = "|".join(name for name in names if "." in name)
    plain = "|".join(name for name in names if "." not in name)
    pattern = rf"(?<![\w./-])(?:(?:config field )?({dotted})|config field ({plain}))\b"
    return re.sub(pattern, lambda m: f"{PREFIX}{m[1] or m[2]}", sentence)


def fields_help(schema: type = Config) -> str:
    """The --help text: every field with its type, default and meaning."""
    lines = ["config fields (--config.FIELD=VALUE):"]
    for field in fields(schema).values():
        kind = describe_type(field.annotation)
        if field.choices:
            kind = " | ".join(field.choices)
        elif math.isfinite(field.at_most):
            kind += f", {describe_range(field)}"
        lines.append(f"  {field.name} = {field.default}  ({kind})")
        lines += textwrap.wrap(
            field.meaning, 78, initial_indent="      ", subsequent_indent="      "
        )
    return "\n".join(lines)
