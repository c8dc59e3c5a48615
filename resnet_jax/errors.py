"""The error that a user can mend, and the end that is none."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A fault in what the user gave: its message is one clear sentence.

    It names the thing, what was expected and what to do. The commands print it
    without a traceback; callers of the library may catch it.
    """


class Preempted(Exception):  # noqa: N818 - it is none
    """A run was asked to stop, by SIGTERM, and has saved: the same call goes on."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt ``name``: the nearest valid one, or all of them."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return f"valid are {', '.join(valid)}"
