"""The argument parser of all commands: a fault gets one sentence with a suggestion."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from resnet_jax.cli.overrides import PREFIX, join_overrides
from resnet_jax.config import Config, nearest_field
from resnet_jax.errors import nearest, printable


class Parser(argparse.ArgumentParser):
    """Keeps line breaks of descriptions; a command's own default is ``run``.

    With ``takes_overrides`` among its defaults, ``--config.FIELD=VALUE`` is left to
    ``parse_overrides``: argparse cannot list the names of all fields.
    """

    commands: Any = None
    """The subcommands, if there are any."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def add_subparsers(self, **options: Any) -> Any:
        """As in argparse; they are required."""
        self.commands = super().add_subparsers(required=True, **options)
        return self.commands

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As in argparse, which parses a subcommand by this method too."""
        arguments = list(sys.argv[1:] if args is None else args)
        if self.get_default("takes_overrides"):
            arguments = join_overrides(arguments)
        for argument in arguments:
            if argument == "--":
                break
            is_flag = argument.startswith("--" if self.commands is None else "-")
            if is_flag and argument not in self._option_string_actions:
                self._refuse_unknown_flag(argument.partition("=")[0])
            elif self.commands is not None and not is_flag:
                self._refuse_unknown_command(argument)
                break  # the rest belongs to the subcommand
        return super().parse_known_args(arguments, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the process with one sentence and status 2."""
        self.exit(2, printable(f"{self.prog}: error: {message}\n"))

    def _refuse_unknown_flag(self, flag: str) -> None:
        takes_overrides = self.get_default("takes_overrides")
        known = self._option_string_actions
        if flag in known or (takes_overrides and flag.startswith(PREFIX)):
            return
        close = difflib.get_close_matches(flag, known, n=1, cutoff=0.75)
        schema = self.get_default("schema") or Config
        field = nearest_field(flag.strip("-").replace("-", "_"), schema)
        if takes_overrides and field is not None:
            close.append(f"{PREFIX}{field}")
        hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
        self.error(f"unknown flag {flag}; {hint}")

    def _refuse_unknown_command(self, name: str) -> None:
        if name not in self.commands.choices:
            hint = nearest(name, self.commands.choices)
            self.error(f"there is no {self.commands.metavar.lower()} {name}; {hint}")
