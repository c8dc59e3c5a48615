"""Factories of modules: how a net is given its parts."""

import functools
from collections.abc import Callable
from typing import Any

ModuleFactory = Callable[..., Any]
"""A class of Linen modules, or a ``functools.partial`` of one."""


def class_of(factory: Any) -> Any:
    """The class that a factory makes modules of."""
    return factory.func if isinstance(factory, functools.partial) else factory
