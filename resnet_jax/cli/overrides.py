"""``--config.FIELD=VALUE`` arguments, and their help."""

import math
import re
import textwrap
from collections.abc import Sequence

from resnet_jax.config import describe_range, describe_type, fields
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


def as_flags(sentence: str) -> str:
    """A sentence with its config fields as flags: ``--config.data.path``."""
    names = "|".join(re.escape(name) for name in fields() if "." in name)
    pattern = rf"(?<![\w./-])(?:config field )?({names})(?![\w.]\w|\w)"
    return re.sub(pattern, rf"{PREFIX}\1", sentence)


def fields_help() -> str:
    """The --help text: every field with its type, default and meaning."""
    lines = ["config fields (--config.FIELD=VALUE):"]
    for field in fields().values():
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
