"""State dicts written by torch.save, read without torch.

Such a file holds a pickle, and a pickle is a program: Python's unpickler imports and
calls whatever the pickle names. ``_Machine`` imports and calls nothing. It handles the
few opcodes that torch.save writes, replaces the few names that a state dict needs with
stand-ins, and refuses everything else. Restricting the names of Python's own unpickler
would not do: a few bytes can make it allocate all memory for its memo, or overflow the
C stack with the hash of a deeply nested tuple.

The numbers are stored outside the pickle, in storages: flat arrays that tensors view
by offset, shape and strides. Only the storages of the state dict are read, once every
view is known to be within its storage.
"""

import dataclasses
import io
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from resnet_jax.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_BIG_ENDIAN = "was saved on a big-endian machine; save it on a little-endian one"

# The pickle of a thousand tensors takes about 200 kB. One byte can create an object of
# a hundred bytes, so these limits bound the memory of the objects too.
_MAX_PICKLE_BYTES = 2**24
_MAX_DICT_PAIRS = 2**20
_MAX_DIMENSIONS = 32
_MAX_NESTING = 3

# Tensors may share storages and repeat elements, within these bounds.
_MAX_EXPANSION = 8
_ALWAYS_ALLOWED_BYTES = 2**26

_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "DoubleStorage": np.dtype("<f8"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_ORDERED_DICT = "collections.OrderedDict"
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")

# What training scripts save beside the weights. Calls to these give _IGNORED.
_IGNORED_NAMES = re.compile(
    r"(__builtin__|builtins)\.(bytearray|complex|set)|collections\.Counter"
    r"|argparse\.Namespace|_codecs\.encode|numpy\.(dtype|ndarray)"
    r"|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)"
    r"|torch\.(device|bfloat16|float16|float32|float64)"
)

# Keys under which checkpoints nest their state dict, in order of preference.
_WRAPPERS = ("state_dict", "model", "model_state_dict")
# Prefixes that data parallelism and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")

# What Python's readers raise on damaged files; pickletools warns of odd escapes.
_DAMAGE = (
    *(ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(ValueError, Warning, struct.error, zipfile.BadZipFile),
)


class _FaultError(Exception):
    """A fault of the file, worded to follow its path in a sentence."""


class _Global(NamedTuple):
    """A name that the pickle would import, "module.name"."""

    name: str


class _Storage(NamedTuple):
    """A flat array of ``size`` elements; its class in torch gives the dtype."""

    key: str
    kind: str
    size: int

    @property
    def dtype(self) -> np.dtype:
        return _DTYPES[self.kind]

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """A view within a storage; the offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Ignored:
    """An object beside the weights, of which nothing is kept."""


_IGNORED = _Ignored()


def read_torch_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the tensors of a state dict written by torch.save; runs nothing in it.

    Both formats are read: the zip archive (torch >= 1.6) and the older one. From a
    checkpoint such as ``{"state_dict": ..., "epoch": ...}`` the nested state dict is
    read. A prefix "module." or "_orig_mod." of all names is removed.

    Args:
      path: the file.

    Returns:
      Arrays by tensor name, in the file's order. Each is C-contiguous, owns its memory
      and has the tensor's shape and dtype (``ml_dtypes.bfloat16`` for bfloat16).

    Raises:
      UserError: the file cannot be read, is damaged, asks for more than tensors, or
        holds no state dict or one with tensors that are not dense and real.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except _FaultError as fault:
        raise UserError(f"{path} {fault}") from None
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the path of a file of "
            "weights that you may read"
        ) from error
    except _DAMAGE as error:
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        raise UserError(
            f"{path} is damaged or cut short ({reason}); copy or download it again"
        ) from error


def printable(text: Any) -> str:
    """A name from a file, escaped and shortened so that it can be printed."""
    text = str(text) if isinstance(text, str | int) else type(text).__name__
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


def _read(file: BinaryIO, size: int) -> dict[str, np.ndarray]:
    head = file.read(4)
    file.seek(0)
    if not head:
        raise _FaultError("is empty; copy or download it again")
    if head == b"PK\x03\x04":
        return _read_zip(file, size)
    if head.startswith(b"\x80"):
        return _read_legacy(file, size)
    raise _FaultError(
        f"is not a file of weights: it begins with the bytes {head.hex(' ')}; give a "
        "file written by torch.save, or a safetensors file"
    )


def _read_zip(file: BinaryIO, size: int) -> dict[str, np.ndarray]:
    """Reads the zip archive of torch >= 1.6: NAME/data.pkl and NAME/data/KEY."""
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            raise _FaultError(
                "is a TorchScript archive, which holds a program; load it with "
                "torch.jit.load and give a file of torch.save(model.state_dict(), FILE)"
            )
        pickles = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(pickles) != 1:
            raise _FaultError(
                "is a zip archive without the data.pkl of torch.save; give a file "
                "written by torch.save"
            )
        folder = pickles[0].removesuffix("/data.pkl")
        byte_order = f"{folder}/byteorder"
        if byte_order in names and _member(archive, byte_order) != b"little":
            raise _FaultError(_BIG_ENDIAN)
        machine = _Machine(io.BytesIO(_member(archive, pickles[0])))
        tensors = _state_dict(machine.run())

        def read_storage(storage: _Storage) -> bytes:
            name = f"{folder}/data/{storage.key}"
            if name not in names:
                raise _FaultError(
                    f"is damaged: it lacks the storage {printable(storage.key)}; copy "
                    "or download it again"
                )
            return _member(archive, name, storage.nbytes)

        return _arrays(tensors, read_storage, size)


def _member(archive: zipfile.ZipFile, name: str, nbytes: int | None = None) -> bytes:
    """The bytes of a member; zipfile verifies the checksum.

    The size must be ``nbytes``, or at most ``_MAX_PICKLE_BYTES`` where that is None.
    """
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise _FaultError(
            f"has {printable(name)} compressed or encrypted, which torch.save never "
            "does; load it with torch and save it again"
        )
    # Refused before it is read: a few bytes can declare any size.
    if nbytes is None and member.file_size > _MAX_PICKLE_BYTES:
        raise _FaultError(
            f"describes its tensors in {member.file_size} bytes, above the limit of "
            f"{_MAX_PICKLE_BYTES}; save the state dict alone"
        )
    if nbytes is not None and member.file_size != nbytes:
        raise _FaultError(
            f"is damaged: {printable(name)} has {member.file_size} bytes instead of "
            f"{nbytes}; copy or download it again"
        )
    content = archive.read(member)
    if len(content) != member.file_size:
        raise EOFError(f"{printable(name)} ends early")
    return content


def _read_legacy(file: BinaryIO, size: int) -> dict[str, np.ndarray]:
    """Reads the format of torch < 1.6: five pickles in a row, then the storages.

    The pickles are a magic number, a version, facts about the machine, the object and
    the keys of the storages. The storages follow in that order, each after its size.
    """
    stream = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    for expected in (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        if _Machine(stream).run() != expected:
            raise _FaultError(
                "is a pickle, but not one of a known version of torch.save; load and "
                "save it again with a newer torch"
            )
    machine_facts = _Machine(stream).run()
    if not isinstance(machine_facts, dict) or not machine_facts.get("little_endian"):
        raise _FaultError(_BIG_ENDIAN)
    machine = _Machine(stream)
    content = machine.run()
    keys = _Machine(stream).run()
    tensors = _state_dict(content)
    starts = _legacy_starts(file, size, stream.tell(), keys, machine.storages)

    def read_storage(storage: _Storage) -> bytes:
        file.seek(starts[storage.key])
        return file.read(storage.nbytes)

    return _arrays(tensors, read_storage, size)


def _legacy_starts(
    file: BinaryIO, size: int, position: int, keys: Any, storages: dict[str, _Storage]
) -> dict[str, int]:
    """The first byte of each storage; all storages are within the file."""
    starts = {}
    for key in keys if isinstance(keys, list) else ():
        name = str(key) if isinstance(key, str | int) else ""
        if name not in storages:
            raise ValueError("a storage without a tensor")
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8))
        if count != storages[name].size:
            raise ValueError(
                f"a storage has {count} elements instead of {storages[name].size}"
            )
        starts[name] = position + 8
        position += 8 + storages[name].nbytes
        if position > size:
            raise EOFError(f"{position} bytes expected, {size} found")
    if starts.keys() != storages.keys():
        raise ValueError("a tensor without its storage")
    return starts


class _Machine:
    """Builds the object that a pickle describes, of plain data and stand-ins.

    Attributes:
      storages: the storages that the pickle has named so far, by key.
    """

    def __init__(self, stream: io.BytesIO):
        """Reads from the position of ``stream``, and leaves it after the pickle."""
        self.storages: dict[str, _Storage] = {}
        self._stream = stream
        self._stack: list[Any] = []
        self._outer_stacks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._pairs = 0

    def run(self) -> Any:
        """Returns the object; raises _FaultError or one of _DAMAGE."""
        for opcode, argument, _ in pickletools.genops(self._stream):
            if opcode.name == "STOP":
                break
            self._step(opcode.name, argument)
        return self._take(1)[0]

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "SHORT_BINUNICODE" | "BINUNICODE" | "SHORT_BINBYTES" | "BINBYTES":
                stack.append(argument)
            case "SHORT_BINSTRING" | "BINSTRING":
                # Python 2 wrote these. pickletools gives each byte as a character.
                stack.append(argument.encode("latin-1").decode("utf-8", "replace"))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(opcode))
            case "MARK":
                self._outer_stacks.append(stack)
                self._stack = []
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._take(int(opcode[-1]))))
            case "TUPLE":
                items = self._take_marked()
                self._stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                self._append(self._take(1))
            case "APPENDS":
                self._append(self._take_marked())
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                self._set_items(self._take(2))
            case "SETITEMS":
                self._set_items(self._take_marked())
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                stack.append(_stand_in(module, name))
            case "STACK_GLOBAL":
                module, name = self._take(2)
                stack.append(_stand_in(module, name))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._take(2)
                stack.append(self._call(function, arguments))
            case "BUILD":
                self._take(1)  # attributes, which weights do not need
                if not isinstance(stack[-1], dict | _Ignored):
                    raise ValueError("a pickle that sets attributes")
            case "BINPERSID":
                (identity,) = self._take(1)
                stack.append(self._storage(identity))
            case _:
                raise _FaultError(
                    f"uses the pickle instruction {opcode}, which a state dict does "
                    "not need: refused, nothing was run; save the state dict alone"
                )

    def _take(self, count: int) -> list[Any]:
        """Removes and returns the last ``count`` objects of the stack."""
        if len(self._stack) < count:
            raise IndexError("a pickle that takes what it did not put")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _take_marked(self) -> list[Any]:
        """Removes and returns the objects since the last mark."""
        items = self._stack
        self._stack = self._outer_stacks.pop()
        return items

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, _Ignored):
            raise ValueError("a pickle that appends to an object that is not a list")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            self._fill(target, zip(items[::2], items[1::2], strict=True))
        elif not isinstance(target, _Ignored):
            raise ValueError("a pickle that sets items of an object that is not a dict")

    def _fill(self, target: dict, pairs: Iterable[tuple[Any, Any]]) -> None:
        for key, value in pairs:
            # Hashing a nested object could overflow the C stack.
            if not isinstance(key, str | int | float | bytes | None):
                raise _FaultError(
                    f"has a dict with a {type(key).__name__} as a key, which a file of "
                    "weights does not need; save the state dict alone"
                )
            # A pickle can name one list of pairs, and make dicts of it, many times.
            self._pairs += 1
            if self._pairs > _MAX_DICT_PAIRS:
                raise _FaultError(
                    f"has more than {_MAX_DICT_PAIRS} entries in its dicts; save the "
                    "state dict alone"
                )
            target[key] = value

    def _call(self, function: Any, arguments: Any) -> Any:
        """The stand-in for the result of a call; nothing is called."""
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("a pickle that calls an object that is not a function")
        name = function.name
        if _IGNORED_NAMES.fullmatch(name):
            return _IGNORED
        if name == _ORDERED_DICT:
            return self._ordered_dict(arguments)
        if name in _REBUILD:
            return _REBUILD[name](arguments)
        raise ValueError(f"a pickle that calls {name}")

    def _ordered_dict(self, arguments: tuple) -> dict[Any, Any]:
        """Empty, or from a list of pairs as Python 2 wrote it."""
        result: dict[Any, Any] = {}
        match arguments:
            case ():
                pass
            case (list(pairs),) if all(
                isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
            ):
                self._fill(result, pairs)
            case _:
                raise ValueError("an OrderedDict of objects that are not pairs")
        return result

    def _storage(self, identity: Any) -> _Storage:
        """The storage of a persistent id, whose fourth part is a device."""
        match identity:
            case (
                "storage",
                _Global(name),
                str() | int() as key,
                _,
                int(size),
                *rest,
            ) if rest in ([], [None]):
                storage = _Storage(str(key), name.rpartition(".")[2], size)
            case _:
                raise _FaultError(
                    "refers to an object outside its pickle that is not a whole "
                    "storage: refused, nothing was run; save the state dict alone"
                )
        if storage.kind not in _DTYPES or size < 0:
            raise ValueError(f"a storage of class {name} and size {size}")
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError("a storage of two classes or sizes")
        return storage


def _stand_in(module: Any, name: Any) -> _Global:
    """A stand-in for a name that a state dict needs; every other name is refused."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a pickle that imports an object that is not a name")
    full = f"{printable(module)}.{printable(name)}"
    is_storage = module in _STORAGE_MODULES and name in _DTYPES
    known = full == _ORDERED_DICT or full in _REBUILD
    if is_storage or known or _IGNORED_NAMES.fullmatch(full):
        return _Global(full)
    raise _FaultError(
        f"asks for {full}, which a file of weights does not need: refused, nothing "
        "was run; if you trust it, load it with torch and save model.state_dict() alone"
    )


def _rebuild_tensor(arguments: tuple) -> _Tensor:
    """A view: (storage, offset, shape, stride, requires_grad, hooks, flags).

    Raises ValueError if an element is outside the storage.
    """
    match arguments:
        case (_Storage() as storage, offset, tuple(shape), tuple(stride), *rest):
            pass
        case _:
            raise ValueError("a tensor of odd parts")
    if rest[2:] and rest[2]:
        raise ValueError("a negated or conjugated tensor")
    if len(shape) != len(stride) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError("a tensor with odd dimensions")
    numbers = (offset, *shape, *stride)
    if not all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers):
        raise ValueError("a tensor with an odd shape, stride or offset")
    steps = [(n - 1) * step for n, step in zip(shape, stride, strict=True)]
    if 0 not in shape and offset + sum(steps) >= storage.size:
        raise ValueError("a tensor that reaches beyond its storage")
    return _Tensor(storage, offset, shape, stride)


def _first_argument(kind: type) -> Callable[[tuple], Any]:
    def rebuild(arguments: tuple) -> Any:
        if not arguments or not isinstance(arguments[0], kind):
            raise ValueError("a parameter or a size of odd parts")
        return arguments[0]

    return rebuild


_REBUILD: dict[str, Callable[[tuple], Any]] = {
    "torch.Size": _first_argument(tuple),
    "torch._utils._rebuild_parameter": _first_argument(_Tensor),
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
}


def _state_dict(content: Any) -> dict[str, _Tensor]:
    """The tensors, by name, of the one state dict in ``content``."""
    tensors = _find_state_dict(content)
    if not tensors:
        raise _FaultError(
            "holds no state dict, a dict of tensors by name; save one with "
            "torch.save(model.state_dict(), FILE)"
        )
    while prefixes := [p for p in _PREFIXES if all(n.startswith(p) for n in tensors)]:
        tensors = {name.removeprefix(prefixes[0]): tensors[name] for name in tensors}
    return tensors


def _find_state_dict(content: Any, nesting: int = 0) -> dict[str, _Tensor] | None:
    """The tensors of ``content`` itself, or of the dict in it that has them."""
    if not isinstance(content, dict) or nesting > _MAX_NESTING:
        return None
    for wrapper in _WRAPPERS:
        if found := _find_state_dict(content.get(wrapper), nesting + 1):
            return found
    inner = {key: found for key in content if (found := _own_tensors(content[key]))}
    # Averaged weights, such as model_ema, are used only if there are no others.
    is_average = {key: "ema" in str(key).lower().split("_") for key in inner}
    plain = {key: found for key, found in inner.items() if not is_average[key]}
    candidates = plain or inner
    if len(candidates) > 1:
        shown = [printable(key) for key in candidates]
        raise _FaultError(
            f"holds several state dicts ({', '.join(shown[:4])}"
            f"{', ...' if shown[4:] else ''}); save the one you want alone"
        )
    # Preferred to tensors of the dict itself, such as a random generator's state.
    return next(iter(candidates.values()), None) or _own_tensors(content)


def _own_tensors(content: Any) -> dict[str, _Tensor]:
    if not isinstance(content, dict):
        return {}
    return {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, _Tensor)
    }


def _arrays(
    tensors: dict[str, _Tensor],
    read_storage: Callable[[_Storage], bytes],
    file_size: int,
) -> dict[str, np.ndarray]:
    """The values of the tensors; holds at most one storage beside them."""
    total = sum(
        math.prod(tensor.shape) * tensor.storage.dtype.itemsize
        for tensor in tensors.values()
    )
    if total > _MAX_EXPANSION * file_size + _ALWAYS_ALLOWED_BYTES:
        raise _FaultError(
            f"describes {total} bytes of tensors in {file_size} bytes: refused; if you "
            "trust it, load it with torch and save contiguous tensors"
        )
    by_storage: dict[_Storage, list[str]] = {}
    for name, tensor in tensors.items():
        by_storage.setdefault(tensor.storage, []).append(name)
    arrays: dict[str, np.ndarray] = {}
    for storage, names in by_storage.items():
        if storage.nbytes > file_size:
            raise EOFError(f"a storage of {storage.nbytes} bytes")
        content = read_storage(storage)
        for name in names:
            arrays[name] = _array(tensors[name], content)
    return {name: arrays[name] for name in tensors}


def _array(tensor: _Tensor, content: bytes) -> np.ndarray:
    """A copy of a tensor's elements from the bytes of its storage."""
    dtype = tensor.storage.dtype
    if 0 in tensor.shape:
        return np.empty(tensor.shape, dtype)
    # The stride of a single element is arbitrary, and may be too large for numpy.
    strides = [
        (step if n > 1 else 0) * dtype.itemsize
        for n, step in zip(tensor.shape, tensor.stride, strict=True)
    ]
    # numpy checks the bounds once more.
    start = tensor.offset * dtype.itemsize
    return np.ndarray(tensor.shape, dtype, content, start, strides).copy(order="C")
