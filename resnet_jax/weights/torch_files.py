"""State dicts written by torch.save, read without torch.

Such a file holds a pickle, and a pickle is a program: Python's unpickler imports and
calls whatever the pickle names. Ours imports nothing. It runs the few opcodes that
torch.save writes, replaces the few names that a state dict needs with stand-ins from
this file, and refuses everything else. It extends Python's unpickler in Python,
because the one in C can be made to allocate all memory for its memo by a few bytes.

The numbers are stored outside the pickle, in storages: flat arrays that tensors view
by offset, shape and strides. Only the storages of the state dict are read, after every
view has been checked to be within its storage.
"""

import io
import itertools
import math
import os
import pickle
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
_MAX_ARGUMENTS = 8
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
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")

# Opcodes that Python's unpickler may run. _Unpickler itself runs five more, and the
# rest are refused.
_INHERITED_OPCODES = (
    "PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL BINPERSID BINPUT LONG_BINPUT MEMOIZE "
    "BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINSTRING SHORT_BINSTRING "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT"
)
_INHERITED = [getattr(pickle, name)[0] for name in _INHERITED_OPCODES.split()]

# Objects that training scripts save with the weights; _Ignored replaces them.
_IGNORED_NAMES = re.compile(
    r"(__builtin__|builtins)\.(bytearray|complex|set)|collections\.Counter"
    r"|argparse\.Namespace|_codecs\.encode|numpy\.(dtype|ndarray)"
    r"|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)"
    r"|torch\.(device|bfloat16|float16|float32|float64)"
)

# Keys under which checkpoints nest their state dict, in order of preference.
_WRAPPERS = ("state_dict", "model", "model_state_dict")


class _FaultError(Exception):
    """A fault of the file, worded to follow its path in a sentence."""


class _Storage(NamedTuple):
    """A flat array of ``size`` elements."""

    key: str
    dtype: np.dtype
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _Tensor(NamedTuple):
    """A view within a storage; the offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Ignored:
    """Stands in for an object that is not part of the weights."""

    def __init__(self, *_: Any):
        pass


def read_torch_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the tensors of a state dict written by torch.save; runs nothing in it.

    Both formats are read: the zip archive (torch >= 1.6) and the older one. From a
    checkpoint such as ``{"state_dict": ..., "epoch": ...}`` the nested state dict is
    read.

    Args:
      path: the file.

    Returns:
      Arrays by tensor name, in the file's order. Each is C-contiguous, owns its memory
      and has the tensor's shape and dtype (``ml_dtypes.bfloat16`` for bfloat16).

    Raises:
      UserError: the file is damaged, asks for more than tensors, or holds no state
        dict or one with tensors that are not dense and real.
      OSError: the file cannot be opened.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            return _read(file, os.fstat(file.fileno()).st_size)
        except _FaultError as fault:
            raise UserError(f"{path} {fault}") from None
        except Exception as error:  # pickle and zipfile raise almost anything
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
    head = file.read(40)
    file.seek(0)
    if not head:
        raise _FaultError("is empty; copy or download it again")
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(file, size)
    if head.startswith(b"\x80"):
        return _read_legacy(file, size)
    raise _FaultError(
        f"is not a file of weights: it begins with {head!r}; give a file written by "
        "torch.save, or a safetensors file"
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
        unpickler = _Unpickler(io.BytesIO(_member(archive, pickles[0])))
        tensors = _state_dict(unpickler.load())

        def read_storage(storage: _Storage) -> bytes:
            return _member(archive, f"{folder}/data/{storage.key}", storage.nbytes)

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
        if _Unpickler(stream).load() != expected:
            raise _FaultError(
                "is a pickle, but not one of a known version of torch.save; load and "
                "save it again with a newer torch"
            )
    machine = _Unpickler(stream).load()
    if not isinstance(machine, dict) or not machine.get("little_endian"):
        raise _FaultError(_BIG_ENDIAN)
    unpickler = _Unpickler(stream)
    content = unpickler.load()
    keys = _Unpickler(stream).load()
    tensors = _state_dict(content)
    starts = _legacy_starts(file, size, stream.tell(), keys, unpickler.storages)

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


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any
) -> _Tensor:
    """A view. ``rest`` is requires_grad, hooks and flags.

    Raises ValueError if an element is outside the storage.
    """
    if not all(map(isinstance, (storage, shape, stride), (_Storage, tuple, tuple))):
        raise ValueError("a tensor of odd parts")
    if any(rest[2:]):
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


def _first_argument(kind: type) -> Callable[..., Any]:
    def rebuild(first: Any, *_: Any) -> Any:
        if not isinstance(first, kind):
            raise ValueError("a parameter or a size of odd parts")
        return first

    return rebuild


_REBUILD: dict[str, Callable[..., Any]] = {
    "torch.Size": _first_argument(tuple),
    "torch._utils._rebuild_parameter": _first_argument(_Tensor),
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
}


class _Dispatch(dict):
    """Methods by opcode; every other opcode is refused."""

    def __missing__(self, code: int) -> Any:
        names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
        raise _FaultError(
            f"uses the pickle instruction {names.get(chr(code), code)}, which a state "
            "dict does not need: refused, nothing was run; save the state dict alone"
        )


class _Unpickler(pickle._Unpickler):
    """Builds plain data and stand-ins.

    Attributes:
      storages: the storages that the pickle has named so far, by key.
    """

    # Of the base class; its type stubs lack them.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="utf-8", errors="replace")
        self.storages: dict[str, _Storage] = {}
        self._pairs = 0

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for a name that a state dict needs."""
        full = f"{printable(module)}.{printable(name)}"
        if full == "collections.OrderedDict":
            return self._ordered_dict
        if full in _REBUILD:
            return _REBUILD[full]
        if module in _STORAGE_MODULES and name in _DTYPES:
            return _DTYPES[name]
        if _IGNORED_NAMES.fullmatch(full):
            return _Ignored
        raise _FaultError(
            f"asks for {full}, which a file of weights does not need: refused, nothing "
            "was run; if you trust it, load it with torch and save model.state_dict() "
            "alone"
        )

    def persistent_load(self, identity: Any) -> _Storage:
        """The storage of a persistent id, whose fourth part is a device."""
        match identity:
            case (
                "storage",
                np.dtype() as dtype,
                str() | int() as key,
                _,
                int(size),
                *rest,
            ) if size >= 0 and rest in ([], [None]):
                storage = _Storage(str(key), dtype, size)
            case _:
                raise _FaultError(
                    "refers to an object outside its pickle that is not a whole "
                    "storage: refused, nothing was run; save the state dict alone"
                )
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError("a storage of two dtypes or sizes")
        return storage

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        # Stand-ins alone are callable: everything else here is plain data.
        if not isinstance(arguments, tuple) or not callable(function):
            raise ValueError("a pickle that calls an object that is not a function")
        if len(arguments) > _MAX_ARGUMENTS:
            raise ValueError("a call with many arguments")
        self.append(function(*arguments))

    def load_build(self) -> None:
        self.stack.pop()  # attributes, which weights do not need
        if not isinstance(self.stack[-1], dict | _Ignored):
            raise ValueError("a pickle that sets attributes")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill(self.stack[-1], [(key, value)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._fill(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def _ordered_dict(self, pairs: Iterable[Any] = ()) -> dict[Any, Any]:
        """Empty, or from a list of pairs as Python 2 wrote it."""
        result: dict[Any, Any] = {}
        self._fill(result, pairs)
        return result

    def _fill(self, target: Any, pairs: Iterable[Any]) -> None:
        if not isinstance(target, dict):
            raise ValueError("a pickle that sets items of an object that is not a dict")
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

    dispatch = _Dispatch(
        {code: pickle._Unpickler.dispatch[code] for code in _INHERITED}
        | {
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_reduce,
            pickle.BUILD[0]: load_build,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
        }
    )


def _state_dict(content: Any) -> dict[str, _Tensor]:
    """The tensors, by name, of the one state dict in ``content``."""
    tensors = _find_state_dict(content)
    if not tensors:
        raise _FaultError(
            "holds no state dict, a dict of tensors by name; save one with "
            "torch.save(model.state_dict(), FILE)"
        )
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
    """The values of the tensors; reads one storage at a time."""
    total = sum(
        math.prod(tensor.shape) * tensor.storage.dtype.itemsize
        for tensor in tensors.values()
    )
    if total > _MAX_EXPANSION * file_size + _ALWAYS_ALLOWED_BYTES:
        raise _FaultError(
            f"describes {total} bytes of tensors in {file_size} bytes: refused; if you "
            "trust it, load it with torch and save contiguous tensors"
        )
    arrays: dict[str, np.ndarray] = {}
    by_storage = sorted(tensors, key=lambda name: tensors[name].storage.key)
    for storage, names in itertools.groupby(by_storage, lambda n: tensors[n].storage):
        if storage.nbytes > file_size:
            raise EOFError(f"a storage of {storage.nbytes} bytes")
        content = read_storage(storage)
        arrays |= {name: _array(tensors[name], content) for name in names}
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
