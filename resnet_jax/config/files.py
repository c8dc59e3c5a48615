"""Runs config files: Python files that define ``get_config(arg)``."""

import contextlib
import importlib.machinery
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from resnet_jax.config.schema import flatten
from resnet_jax.errors import UserError
from resnet_jax.storage import expand, is_remote, open_regular

_MOST_BYTES = 2**24
"""Size of a config file; larger ones are something else, such as weights."""


def run_config_file(spec: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a file's ``get_config`` sets, by dotted name of their field.

    Args:
      spec: ``PATH`` or ``PATH:ARG``.
      overrides: values that replace the file's.

    Raises:
      UserError: the file is missing, fails, or returns something else.
    """
    # Imported here because the training step must not need it.
    import ml_collections

    before, _, arg = spec.partition(".py:")
    path, source = _read(before + ".py" if arg else spec)
    with _importable(path.parent), _naming_faults(path):
        module = _run(path, source)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(
                f"{path} defines no function get_config(); see configs/digits.py"
            )
        config = _call(path, get_config, arg)
        if not isinstance(config, ml_collections.ConfigDict):
            raise UserError(
                f"{path}: get_config must return a ConfigDict made by "
                f"default_config(), not {type(config).__name__}"
            )
        config = ml_collections.ConfigDict(config, type_safe=False)
        for name, value in overrides.items():
            *sections, key = name.split(".")
            target = config
            for section in sections:
                target = target[section]
            target[key] = value
        # Here, because values that refer to others are computed when they are read.
        return flatten(config.copy_and_resolve_references())


def _read(name: str) -> tuple[Path, bytes]:
    """A config file's path and content."""
    if is_remote(name):
        raise UserError(f"config file {name} is a URL; give a file on this machine")
    path = expand(name)
    try:
        with open_regular(path) as file:
            source = file.read(_MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"config file {path} does not exist; give the path of a file such as "
            "configs/digits.py or configs/cifar10.py:cifar_resnet56"
        ) from None
    except OSError as error:
        raise UserError(
            f"config file {path} cannot be read: {error.strerror}; give a Python file "
            "such as configs/digits.py"
        ) from None
    if len(source) > _MOST_BYTES:
        raise UserError(
            f"config file {path} has more than {_MOST_BYTES >> 20} MiB: it is no config"
        )
    return path, source


def _run(path: Path, source: bytes) -> Any:
    """Runs a file as a module of ``sys.modules``, which dataclasses need."""
    name = f"_config_{path.stem}"  # no module that is installed
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # Not by the loader, which would write its bytecode beside the file.
    exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    return module


def _call(path: Path, get_config: Callable[..., Any], arg: str) -> Any:
    signature = inspect.signature(get_config)
    if arg and not signature.parameters:
        raise UserError(f"{path}: its get_config takes no argument, not {arg!r}")
    arguments = [arg] if arg else []
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise UserError(
            f"{path}: get_config{signature} is called with one argument for "
            f"{path.name}:ARG, or with none: {error}"
        ) from None
    return get_config(*arguments)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Lets imports find the modules beside a config file.

    They are forgotten at the end: the next config file may have others of that name.
    """
    place = str(folder.absolute())
    if place in sys.path:
        yield
        return
    before = set(sys.modules)
    importlib.invalidate_caches()
    sys.path.insert(0, place)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(place)
        new = {name: sys.modules[name] for name in set(sys.modules) - before}
        for name in new:
            top = name.partition(".")[0]
            file = getattr(new.get(top), "__file__", None) or ""
            if Path(place) in Path(file).parents:
                del sys.modules[name]


@contextlib.contextmanager
def _naming_faults(path: Path) -> Iterator[None]:
    """Turns whatever a config file raises into a sentence with its line."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # sys.exit() too
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines.append(error.lineno)
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        text = traceback.format_exception_only(error)[-1].strip().split("\n")[0]
        raise UserError(f"{where}: {text}") from error
