"""Config files: Python files that define ``get_config(arg)``."""

import ast
import contextlib
import difflib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import resnet_jax
from resnet_jax.config.schema import flatten
from resnet_jax.environment import checkout
from resnet_jax.errors import UserError
from resnet_jax.storage import expand, is_remote, open_regular

_MOST_BYTES = 2**24
"""Size of a config file; larger ones are something else, such as weights."""


def list_configs() -> dict[str, str]:
    """The config files that come with the package: names and first lines."""
    names = sorted(_shipped())
    return {name: config_file(name)[1].partition("\n")[0] for name in names}


def config_file(spec: str) -> tuple[Path, str]:
    """The path of a config file, and what its docstring says.

    Raises:
      UserError: there is no such file, or it is not Python.
    """
    path, _ = _locate(spec)
    with _naming_faults(path):
        return path, ast.get_docstring(ast.parse(_read(path), str(path))) or ""


def _shipped() -> list[str]:
    folder = config_folder()
    names = (str(path.relative_to(folder)) for path in folder.rglob("*.py"))
    return [name.removesuffix(".py") for name in names if "__" not in name]


def config_folder() -> Path:
    """The folder of config files: the checkout's, or that of the installed package."""
    return (checkout() or Path(resnet_jax.__file__).parent) / "configs"


def run_config_file(spec: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a file's ``get_config`` sets, by dotted name of their field.

    Args:
      spec: a path, or a name of ``list_configs``; then ``:ARG`` if there is one.
      overrides: values that replace the file's.

    Raises:
      UserError: the file is missing, fails, or returns something else.
    """
    # Imported here because the training step must not need it.
    import ml_collections

    path, arg = _locate(spec)
    source = _read(path)
    with _importable(path.parent), _naming_faults(path):
        module = _run(path, source)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(f"{path} defines no function get_config(); see {_EXAMPLE}")
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


_EXAMPLE = config_folder() / "digits.py"


def _locate(spec: str) -> tuple[Path, str]:
    """The path and the argument that a spec names. A file of this name comes first."""
    before, dot_py, arg = spec.partition(".py:")
    file = f"{before}.py" if dot_py else spec
    if is_remote(file):
        raise UserError(f"config file {file} is a URL; give a file on this machine")
    path = expand(file)
    if os.path.exists(path):  # unlike Path.exists, also for a name that is too long
        return path, arg
    name, _, arg = spec.partition(":")
    name = name.removeprefix("configs/").removesuffix(".py")
    known = {other.rpartition("/")[2]: other for other in _shipped()}
    if name in known.values():
        return config_folder() / f"{name}.py", arg
    close = difflib.get_close_matches(name.rpartition("/")[2], known, n=1)
    beside = f"{path}.py"
    hint = f" (did you mean {known[close[0]]}?)" if close else ""
    if os.path.isfile(beside):
        hint = f" (did you mean {beside}?)"
    raise UserError(
        f"config file {path} does not exist: give the path of a file, or a name that "
        f"resnet-jax configs lists{hint}"
    )


def _read(path: Path) -> bytes:
    """A config file's content."""
    try:
        with open_regular(path) as file:
            source = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"config file {path} cannot be read: {error.strerror}; give a Python file "
            f"such as {_EXAMPLE}"
        ) from None
    if len(source) > _MOST_BYTES:
        raise UserError(
            f"config file {path} has more than {_MOST_BYTES >> 20} MiB: it is no config"
        )
    return source


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
