"""User-fixable errors, and a requested stop."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Invalid input. The message is one sentence: the fault, and how to fix it.

    Commands print it without a traceback; library callers may catch it.
    """


class Preempted(Exception):  # noqa: N818 - not an error
    """A run stopped on a signal after saving; the same call continues it.

    Attributes:
      exit_status: for the process: 0, or 130 after Ctrl-C, as shells expect.
    """

    def __init__(self, sentence: str, exit_status: int = 0):
        super().__init__(sentence)
        self.exit_status = exit_status


def printable(text: str) -> str:
    r"""Text without control characters: an escape character becomes ``\x1b``.

    Names of data sets and files come from anywhere, and a terminal obeys such
    characters. Line breaks stay.
    """
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest valid name, or the valid ones."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"valid are {some_of(valid)}"


def some_of(names: Sequence[str], most: int = 100) -> str:
    """Names joined by commas; of very many, the first ones and their number."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:10])}, ... ({len(names):,} in all)"
