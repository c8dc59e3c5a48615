"""Factories of modules: how a net receives its blocks, convolutions and norms."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

ModuleFactory = Callable[..., Any]
"""A class of Linen modules, or a ``functools.partial`` of one."""


def class_of(factory: Any) -> Any:
    """The class of the modules that a factory makes."""
    return factory.func if isinstance(factory, functools.partial) else factory


def field_names(factory: Any) -> set[str]:
    """The fields of a factory's class; empty if it is not a dataclass."""
    cls = class_of(factory)
    if not dataclasses.is_dataclass(cls):
        return set()
    return {field.name for field in dataclasses.fields(cls)}


def option_of(factory: Any, name: str) -> Any:
    """The value that a factory gives to a field: bound, or the class's default."""
    if isinstance(factory, functools.partial) and name in factory.keywords:
        return factory.keywords[name]
    return getattr(class_of(factory), name)
