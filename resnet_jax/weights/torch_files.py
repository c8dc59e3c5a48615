"""State dicts that torch.save wrote, read without torch.

Such a file holds a pickle, and a pickle is a program: the usual unpickler imports what
it names and calls it. ``_Machine`` imports and calls nothing. It steps through the few
opcodes that torch.save writes and puts a stand-in for each name that a state dict
needs; every other name ends the reading. Python's own unpickler with its names
restricted would not do: a few bytes can make it set aside all memory for its memo, or
overflow the C stack with the hash of a deep tuple.

The numbers lie outside the pickle, in storages: flat arrays that one or more tensors
view by an offset, a shape and strides. They are read when all views are known to lie
within them, and only those of the state dict.
"""

import dataclasses
import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from resnet_jax.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# The pickle of a thousand tensors takes about 200 kB. An opcode of one byte can make an
# object of a hundred, so that this bounds the memory of the objects too.
_MAX_PICKLE_BYTES = 2**24
_MAX_DICT_PAIRS = 2**20
_MAX_DIMENSIONS = 32
_MAX_NESTING = 3

# Storages may be shared and elements repeated, within these bounds.
_MAX_EXPANSION = 8
_ALWAYS_ALLOWED_BYTES = 2**26

_STORAGE_DTYPES = {
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
    "UntypedStorage": np.dtype("u1"),
    "_UntypedStorage": np.dtype("u1"),
    # These are told apart to skip their bytes, and refused in a state dict.
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
    "QInt8Storage": np.dtype("i1"),
    "QUInt8Storage": np.dtype("u1"),
    "QInt32Storage": np.dtype("<i4"),
    "QUInt4x2Storage": np.dtype("u1"),
    "QUInt2x4Storage": np.dtype("u1"),
}
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")

# torch names its newer dtypes beside a storage of bytes.
_DTYPES = {
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
    "torch.bool": np.dtype("?"),
    "torch.float16": np.dtype("<f2"),
    "torch.float32": np.dtype("<f4"),
    "torch.float64": np.dtype("<f8"),
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch.float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "torch.float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "torch.float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "torch.int8": np.dtype("i1"),
    "torch.int16": np.dtype("<i2"),
    "torch.int32": np.dtype("<i4"),
    "torch.int64": np.dtype("<i8"),
    "torch.uint8": np.dtype("u1"),
    "torch.uint16": np.dtype("<u2"),
    "torch.uint32": np.dtype("<u4"),
    "torch.uint64": np.dtype("<u8"),
}

# Tensors that are refused where the state dict holds them, by what they are.
_UNSUPPORTED_CALLS = {
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "valueless (meta)",
}
_UNSUPPORTED_DTYPES = {
    "torch.complex32": "complex",
    "torch.complex64": "complex",
    "torch.complex128": "complex",
    "torch.qint8": "quantised",
    "torch.qint32": "quantised",
    "torch.quint8": "quantised",
    "torch.quint4x2": "quantised",
    "torch.quint2x4": "quantised",
    "torch.bits8": "bits8",
    "torch.bits16": "bits16",
    "torch.bits1x8": "bits1x8",
    "torch.bits2x4": "bits2x4",
    "torch.bits4x2": "bits4x2",
    "torch.float4_e2m1fn_x2": "float4",
}

# What training scripts put beside the weights: all of it becomes _IGNORED.
_IGNORED_NAMES = frozenset(
    {
        "__builtin__.bytearray",
        "__builtin__.complex",
        "__builtin__.set",
        "_codecs.encode",
        "argparse.Namespace",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.set",
        "collections.Counter",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "torch.device",
        "torch.per_channel_affine",
        "torch.per_channel_affine_float_qparams",
        "torch.per_tensor_affine",
        "torch.serialization._get_layout",
    }
)

# How checkpoints name the state dict in them, the first that is there.
_WRAPPERS = ("state_dict", "model", "model_state_dict")
# What wraps a model for training or compiling puts before all names.
_PREFIXES = ("module.", "_orig_mod.")

# What Python's readers raise where a file is damaged. Warning, since pickletools warns
# of odd escapes and a strict filter makes an exception of it.
_DAMAGE = (
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
    Warning,
    struct.error,
    zipfile.BadZipFile,
)


class _FaultError(Exception):
    """What is wrong with a file: the words that follow its path in the sentence."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Global:
    """A name that the pickle would import, "module.name"."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """A flat array in the file, or a part of one.

    Attributes:
      key: the array's name in the file.
      kind: torch's name of its class.
      size: elements of the whole array.
      first, count: the elements that belong to the part.
    """

    key: str
    kind: str
    size: int
    first: int
    count: int

    @property
    def dtype(self) -> np.dtype:
        return _STORAGE_DTYPES[self.kind]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """A view of a storage that is known to lie within it.

    Attributes:
      start: its first byte in the whole array.
      stride: in elements.
    """

    storage: _Storage
    dtype: np.dtype
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Unsupported:
    """A tensor that no array can stand for."""

    kind: str


@dataclasses.dataclass(slots=True, eq=False)
class _Parameter:
    """A parameter as early versions of torch wrote it: its tensor comes after it."""

    tensor: _Tensor | _Unsupported | None = None


class _Ignored:
    """An object beside the weights, of which nothing is kept."""

    __slots__ = ()


_IGNORED = _Ignored()


def read_torch_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a state dict that torch.save wrote; nothing in the file is run.

    Both formats are read, the zip archive (torch >= 1.6) and the one before it. Of a
    checkpoint that nests its state dict, as ``{"state_dict": ..., "epoch": ...}``, the
    tensors of that; "module." or "_orig_mod." before all names is left out.

    Args:
      path: the file.

    Returns:
      Arrays by the names of the tensors, in the order of the file, each C-contiguous
      in memory of its own and of the tensor's shape and dtype (ml_dtypes' for bfloat16
      and float8).

    Raises:
      UserError: the file cannot be read, is damaged, asks for more than tensors, or
        holds no state dict or one with sparse, quantised or complex tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except _FaultError as fault:
        raise UserError(f"{path} {fault}") from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the path of a file of "
            "torch.save"
        ) from error
    except PermissionError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); change its permissions"
        ) from error
    except _DAMAGE as error:
        raise UserError(
            f"{path} is damaged or cut short ({_reason(error)}); copy or download it "
            "again"
        ) from error


def _read(file: BinaryIO, size: int) -> dict[str, np.ndarray]:
    head = file.read(512)
    file.seek(0)
    if not head:
        raise _FaultError("is empty; copy or download it again")
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(file, size)
    if head.startswith(b"\x80"):
        return _read_legacy(file, size)
    if head[257:262] == b"ustar":
        raise _FaultError(
            "is a tar archive, as the first versions of torch wrote, which is not "
            "read; load and save it again with a newer torch, or unpack it if it is an "
            "archive of files"
        )
    raise _FaultError(
        f"is not a file of weights: it begins with the bytes {head[:4].hex(' ')}; give "
        "one that torch.save wrote, or a safetensors file"
    )


def _read_zip(file: BinaryIO, size: int) -> dict[str, np.ndarray]:
    """The zip archive of torch >= 1.6: NAME/data.pkl and NAME/data/KEY."""
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            raise _FaultError(
                "is a TorchScript archive, which holds a program; load it with "
                "torch.jit.load and give a file of torch.save(model.state_dict(), FILE)"
            )
        pickles = [
            name
            for name in names
            if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if len(pickles) != 1:
            raise _FaultError(
                "is a zip archive without the data.pkl of torch.save; give a file "
                "that torch.save wrote"
            )
        folder = pickles[0].removesuffix("/data.pkl")
        byte_order = f"{folder}/byteorder"
        if byte_order in names and _member(archive, byte_order) != b"little":
            raise _FaultError(
                "was saved on a big-endian machine, which is not read; load and save "
                "it again on a little-endian one"
            )
        machine = _Machine(io.BytesIO(_member(archive, pickles[0])))
        tensors = _state_dict(machine.run())

        def read_storage(storage: _Storage) -> bytes:
            name = f"{folder}/data/{storage.key}"
            if name not in names:
                raise _FaultError(
                    f"is damaged: it lacks the storage {_shown(storage.key)}; copy or "
                    "download it again"
                )
            return _member(archive, name, storage.nbytes)

        return _arrays(tensors, read_storage, size)


def _member(archive: zipfile.ZipFile, name: str, nbytes: int | None = None) -> bytes:
    """The bytes of a member, whose checksum zipfile compares.

    Args:
      archive: the file.
      name: of the member.
      nbytes: how many they must be; unless known, at most those of a pickle.
    """
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise _FaultError(
            f"has {_shown(name)} compressed or encrypted, which torch.save does not; "
            "load it with torch and save it again"
        )
    # Refused before it is read: a few bytes can declare any size.
    if nbytes is None and member.file_size > _MAX_PICKLE_BYTES:
        raise _FaultError(
            f"describes its tensors in {member.file_size} bytes, more than the "
            f"{_MAX_PICKLE_BYTES} that are read; save the state dict alone"
        )
    if nbytes is not None and member.file_size != nbytes:
        raise _FaultError(
            f"is damaged: {_shown(name)} has {member.file_size} bytes instead of "
            f"{nbytes}; copy or download it again"
        )
    content = archive.read(member)
    if len(content) != member.file_size:
        raise EOFError(f"{_shown(name)} ends early")
    return content


def _read_legacy(file: BinaryIO, size: int) -> dict[str, np.ndarray]:
    """The format of torch < 1.6: five pickles in a row, then the storages.

    The pickles are a magic number, a version, facts about the machine, the object and
    the keys of the storages, which follow in that order, each after its size.
    """
    stream = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    if _Machine(stream).run() != _LEGACY_MAGIC:
        raise _FaultError(
            "is a pickle, but not one of torch.save; give a file that torch.save wrote"
        )
    if _Machine(stream).run() != _LEGACY_PROTOCOL:
        raise _FaultError(
            "is of an unknown version of torch.save; load and save it again with a "
            "newer torch"
        )
    match _Machine(stream).run():
        case {"little_endian": True}:
            pass
        case _:
            raise _FaultError(
                "was saved on a big-endian machine, which is not read; load and save "
                "it again on a little-endian one"
            )
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
    """The first byte of each storage, all of which lie within the file."""
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
    """Builds what a pickle describes: plain data and the stand-ins above.

    Attributes:
      storages: those the pickle has named so far, by their keys.
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
        """The object that the pickle describes.

        Raises:
          _FaultError: it asks for what is not allowed.
          EOFError and others of _DAMAGE: it is no whole pickle.
        """
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
                if argument not in self._memo:
                    raise ValueError("a pickle that gets what it did not put")
                stack.append(self._memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                stack.append(argument)
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "SHORT_BINSTRING" | "BINSTRING":
                # Of Python 2; pickletools gives each byte as a character.
                stack.append(argument.encode("latin-1").decode("utf-8", "replace"))
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
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
            case "EMPTY_SET":
                stack.append(_IGNORED)
            case "ADDITEMS":
                self._append(self._take_marked())
            case "FROZENSET":
                self._take_marked()
                self._stack.append(_IGNORED)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                self._set_items(self._take(2))
            case "SETITEMS":
                self._set_items(self._take_marked())
            case "POP":
                self._take(1)
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                stack.append(_known(module, name))
            case "STACK_GLOBAL":
                module, name = self._take(2)
                stack.append(_known(module, name))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._take(2)
                stack.append(self._call(function, arguments))
            case "BUILD":
                (state,) = self._take(1)
                _set_state(stack[-1], state)
            case "BINPERSID":
                (identity,) = self._take(1)
                stack.append(self._storage(identity))
            case _:
                raise _FaultError(
                    f"uses the pickle instruction {opcode}, which a state dict does "
                    "not need: refused, nothing was run; save the state dict alone"
                )

    def _take(self, count: int) -> list[Any]:
        """The last ``count`` objects, taken from the stack."""
        if len(self._stack) < count:
            raise IndexError("a pickle that takes what it did not put")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _take_marked(self) -> list[Any]:
        """The objects since the last mark; the stack before it is in place again."""
        items = self._stack
        self._stack = self._outer_stacks.pop()
        return items

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, _Ignored):
            raise ValueError("a pickle that appends to what is no list")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            self._fill(target, zip(items[::2], items[1::2], strict=True))
        elif not isinstance(target, _Ignored):
            raise ValueError("a pickle that sets items of what is no dict")

    def _fill(self, target: dict, pairs: Iterable[tuple[Any, Any]]) -> None:
        for key, value in pairs:
            # The hash of anything that nests could overflow the C stack.
            if not isinstance(key, str | int | float | bytes | None):
                raise _FaultError(
                    f"has a dict with a {type(key).__name__} as a key, which a file of "
                    "weights has no use for; save the state dict alone"
                )
            # One list of pairs may be named, and made a dict, many times.
            self._pairs += 1
            if self._pairs > _MAX_DICT_PAIRS:
                raise _FaultError(
                    f"has more than {_MAX_DICT_PAIRS} entries in its dicts; save the "
                    "state dict alone"
                )
            target[key] = value

    def _call(self, function: Any, arguments: Any) -> Any:
        """What the pickle would get from a call, of a known name only."""
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("a pickle that calls what is no function")
        name = function.name
        if name in _IGNORED_NAMES:
            return _IGNORED
        if name in _UNSUPPORTED_CALLS:
            return _Unsupported(_UNSUPPORTED_CALLS[name])
        if name in _CALLS:
            return _CALLS[name](arguments)
        if name == "collections.OrderedDict":
            return self._ordered_dict(arguments)
        raise ValueError(f"a pickle that calls {name}")

    def _ordered_dict(self, arguments: tuple) -> dict[Any, Any]:
        """Empty, or in Python 2 of a list of pairs."""
        result: dict[Any, Any] = {}
        match arguments:
            case ():
                pass
            case (list(pairs),) if all(
                isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
            ):
                self._fill(result, pairs)
            case _:
                raise ValueError("an OrderedDict of what are no pairs")
        return result

    def _storage(self, identity: Any) -> _Storage:
        """The storage of a persistent id: (its key, class and size), and a part of it.

        The device that it lay on is of no interest.
        """
        match identity:
            case ("storage", _Global(name), str() | int() as key, _, int(size), *rest):
                kind = name.rpartition(".")[2]
            case _:
                raise _FaultError(
                    "refers to an object outside its pickle that is no storage: "
                    "refused, nothing was run; save the state dict alone"
                )
        if kind not in _STORAGE_DTYPES or size < 0:
            raise ValueError(f"a storage of the class {name} and size {size}")
        whole = _Storage(str(key), kind, size, 0, size)
        known = self.storages.setdefault(whole.key, whole)
        if (known.kind, known.size) != (kind, size):
            raise ValueError("a storage of two classes or sizes")
        match rest:
            case [] | [None]:
                return known
            case [(_, int(first), int(count))] if 0 <= first <= first + count <= size:
                return dataclasses.replace(known, first=first, count=count)
            case _:
                raise ValueError("a part that lies outside its storage")


def _known(module: Any, name: Any) -> _Global:
    """A stand-in for a name that a state dict needs.

    Raises:
      _FaultError: for every other name.
    """
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a pickle that imports what is no name")
    full = f"{_shown(module)}.{_shown(name)}"
    is_storage = module in _STORAGE_MODULES and name in _STORAGE_DTYPES
    if is_storage or any(full in names for names in _KNOWN_NAMES):
        return _Global(full)
    raise _FaultError(
        f"asks for {full}, which a file of weights has no use for: refused, nothing "
        "was run; if you trust it, load it with torch and save model.state_dict() alone"
    )


def _set_state(target: Any, state: Any) -> None:
    """Attributes that the pickle sets, of which only a parameter's tensor is kept."""
    if isinstance(target, _Parameter):
        if isinstance(state, tuple) and len(state) == 5:
            target.tensor = _as_tensor(state[0])
    elif not isinstance(target, dict | _Ignored):
        raise ValueError("a pickle that sets attributes")


def _tensor(
    storage: _Storage, dtype: np.dtype, offset: Any, shape: Any, stride: Any
) -> _Tensor:
    """A tensor whose elements, all of them, lie within its storage.

    Raises:
      ValueError: they do not, or the numbers are none.
    """
    if len(shape) != len(stride) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError("a tensor with odd dimensions")
    numbers = (offset, *shape, *stride)
    if not all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers):
        raise ValueError("a tensor with an odd shape, stride or offset")
    steps = [(n - 1) * step for n, step in zip(shape, stride, strict=True)]
    available = storage.count * storage.dtype.itemsize // dtype.itemsize
    if 0 not in shape and offset + sum(steps) >= available:
        raise ValueError("a tensor that reaches beyond its storage")
    start = storage.first * storage.dtype.itemsize + offset * dtype.itemsize
    return _Tensor(storage, dtype, start, tuple(shape), tuple(stride))


def _rebuild_tensor(arguments: tuple) -> _Tensor | _Unsupported:
    """A tensor of a typed storage: (storage, offset, shape, stride, ...)."""
    match arguments:
        case (_Storage() as storage, offset, tuple(shape), tuple(stride), *rest):
            if storage.kind.startswith("Complex"):
                return _Unsupported("complex")
            if storage.kind.startswith("Q"):
                return _Unsupported("quantised")
            if rest[2:] and rest[2]:
                return _Unsupported("negated or conjugated")
            return _tensor(storage, storage.dtype, offset, shape, stride)
    raise ValueError("a tensor of odd parts")


def _rebuild_tensor_v3(arguments: tuple) -> _Tensor | _Unsupported:
    """A tensor of bytes: (storage, offset, shape, stride, _, _, dtype, ...)."""
    match arguments:
        case (
            _Storage() as storage,
            offset,
            tuple(shape),
            tuple(stride),
            _,
            _,
            _Global(dtype),
            *rest,
        ):
            if dtype in _UNSUPPORTED_DTYPES:
                return _Unsupported(_UNSUPPORTED_DTYPES[dtype])
            if rest and rest[0]:
                return _Unsupported("negated or conjugated")
            if dtype in _DTYPES:
                return _tensor(storage, _DTYPES[dtype], offset, shape, stride)
    raise ValueError("a tensor of odd parts")


def _rebuild_parameter(arguments: tuple) -> _Tensor | _Unsupported:
    """A parameter is its tensor: (tensor, ...)."""
    return _as_tensor(arguments[0])


def _new_parameter(arguments: tuple) -> _Parameter:
    """A parameter of an early torch: (tensor, ...), or () where the tensor follows."""
    return _Parameter(_as_tensor(arguments[0]) if arguments else None)


def _size(arguments: tuple) -> tuple:
    """A torch.Size, which is a tuple."""
    match arguments:
        case (tuple(sizes),):
            return sizes
    raise ValueError("a torch.Size that is no tuple")


def _as_tensor(value: Any) -> _Tensor | _Unsupported:
    if isinstance(value, _Parameter):
        value = value.tensor
    if not isinstance(value, _Tensor | _Unsupported):
        raise ValueError("a parameter that is no tensor")
    return value


_CALLS: dict[str, Callable[[tuple], Any]] = {
    "torch.Size": _size,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch.autograd.variable.Variable": _new_parameter,
    "torch.nn.parameter.Parameter": _new_parameter,
}
_KNOWN_NAMES = (
    _CALLS,
    _DTYPES,
    _IGNORED_NAMES,
    _UNSUPPORTED_CALLS,
    _UNSUPPORTED_DTYPES,
    # A layout is named beside a sparse tensor alone.
    {"collections.OrderedDict", "torch.sparse_coo", "torch.sparse_csr"},
)


def _state_dict(content: Any) -> dict[str, _Tensor]:
    """The tensors of the state dict in ``content``, by their names.

    Raises:
      _FaultError: there is none, or no single one, or one of its tensors is
        unsupported.
    """
    tensors = _find_state_dict(content)
    if not tensors:
        raise _FaultError(
            "holds no state dict: no dict of tensors by their names is in it; save "
            "one with torch.save(model.state_dict(), FILE)"
        )
    result = {}
    for name, value in tensors.items():
        if isinstance(value, _Unsupported):
            raise _FaultError(
                f"holds {_shown(name)} as a {value.kind} tensor; only dense tensors of "
                "real numbers are read: convert it with torch and save it again"
            )
        result[name] = value
    while prefix := _common_prefix(result):
        result = {name.removeprefix(prefix): value for name, value in result.items()}
    return result


def _find_state_dict(
    content: Any, nesting: int = 0
) -> dict[str, _Tensor | _Unsupported] | None:
    """The tensors of ``content`` itself, or of the dict in it that has them."""
    if not isinstance(content, dict) or nesting > _MAX_NESTING:
        return None
    for wrapper in _WRAPPERS:
        found = _find_state_dict(content.get(wrapper), nesting + 1)
        if found:
            return found
    inner = {key: found for key in content if (found := _own_tensors(content[key]))}
    # The averaged weights are taken only where there are no others.
    plain = {key: found for key, found in inner.items() if not _is_average(key)}
    candidates = plain or inner
    if len(candidates) > 1:
        shown = [_shown(key) for key in candidates]
        raise _FaultError(
            f"holds several state dicts ({', '.join(shown[:4])}"
            f"{', ...' if shown[4:] else ''}); save the one you want alone"
        )
    # Before the tensors of the dict itself, which may be a random generator's state.
    return next(iter(candidates.values()), None) or _own_tensors(content)


def _is_average(key: Any) -> bool:
    """Whether a name, as model_ema, speaks of an exponential moving average."""
    return "ema" in str(key).lower().split("_")


def _own_tensors(content: Any) -> dict[str, _Tensor | _Unsupported]:
    """The tensors of a dict that it has by a name."""
    if not isinstance(content, dict):
        return {}
    values = {
        key: value.tensor if isinstance(value, _Parameter) else value
        for key, value in content.items()
        if isinstance(key, str)
    }
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, _Tensor | _Unsupported)
    }


def _common_prefix(names: Iterable[str]) -> str | None:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in names):
            return prefix
    return None


def _arrays(
    tensors: dict[str, _Tensor],
    read_storage: Callable[[_Storage], bytes],
    file_size: int,
) -> dict[str, np.ndarray]:
    """The tensors' values, with no more than one storage in memory beside them."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > _MAX_EXPANSION * file_size + _ALWAYS_ALLOWED_BYTES:
        raise _FaultError(
            f"describes {total} bytes of tensors in {file_size} bytes: refused; load "
            "it with torch, if you trust it, and save contiguous tensors"
        )
    of_storage: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        of_storage.setdefault(tensor.storage.key, []).append(name)
    arrays: dict[str, np.ndarray] = {}
    for names in of_storage.values():
        storage = tensors[names[0]].storage
        if storage.nbytes > file_size:
            raise EOFError(f"a storage of {storage.nbytes} bytes")
        content = read_storage(storage)
        for name in names:
            arrays[name] = _array(tensors[name], content)
    return {name: arrays[name] for name in tensors}


def _array(tensor: _Tensor, content: bytes) -> np.ndarray:
    """A copy of a tensor's elements in the bytes of its storage."""
    if 0 in tensor.shape:
        return np.empty(tensor.shape, tensor.dtype)
    # The stride of a single element is arbitrary, and may be too large for numpy.
    strides = [
        (step if n > 1 else 0) * tensor.dtype.itemsize
        for n, step in zip(tensor.shape, tensor.stride, strict=True)
    ]
    # numpy compares the bounds once more.
    view = np.ndarray(tensor.shape, tensor.dtype, content, tensor.start, strides)
    return view.copy(order="C")


def _shown(text: Any) -> str:
    """A name out of a file, fit to be printed."""
    text = str(text) if isinstance(text, str | int) else type(text).__name__
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


def _reason(error: BaseException) -> str:
    """What an exception says, on one line."""
    return _shown(" ".join(str(error).split())) or type(error).__name__
