"""Files of weights: read by what they hold, whatever they are called, and written.

``read_arrays`` takes safetensors and both formats of torch.save; ``write_safetensors``
writes the first, which any library reads and which can hold no program.
"""

import codecs
import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from resnet_jax.errors import UserError
from resnet_jax.weights.torch_files import read_torch_file

# safetensors.numpy knows neither bfloat16 nor float8 in all its versions.
_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# The longest header that safetensors itself accepts.
_MAX_HEADER_BYTES = 100_000_000


def read_arrays(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file of weights, and the texts that were saved beside them.

    Args:
      path: a safetensors file, or one of torch.save (``read_torch_file`` says which).

    Returns:
      Arrays by their names, each C-contiguous and of the dtype that it was saved in
      (ml_dtypes' for bfloat16 and float8); and the file's metadata, which only
      safetensors has.

    Raises:
      UserError: the file cannot be read, is damaged or of another kind.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(4096)
        if _is_safetensors(head):
            return _read_safetensors(path, path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the path of a file of "
            "weights that you may read"
        ) from error
    accident = _accident(head)
    if accident:
        raise UserError(f"{path} {accident}")
    return read_torch_file(path), {}


def write_safetensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays as a safetensors file, whole or not at all.

    Args:
      path: the file, replaced in one step if it is there.
      arrays: by their names, strided or byte-swapped as they may be.
      metadata: texts to save beside them.

    Raises:
      UserError: the folder is missing, the file cannot be written, or an array is of
        a dtype that safetensors has not.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(
            f"{path} cannot be written: there is no folder {path.parent}; create it, "
            "or give another path"
        )
    if path.is_dir():
        raise UserError(
            f"{path} cannot be written: it is a folder; give the path of a file in it"
        )
    plain = {name: _plain(path, name, array) for name, array in arrays.items()}
    texts = None if metadata is None else dict(metadata)
    try:
        with replacing(path) as temporary:
            safetensors.numpy.save_file(plain, temporary, texts)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({error}); make room or give another path"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, whose file becomes ``path`` in one step.

    Where the block fails, ``path`` is as it was and the temporary file is gone.
    """
    # Of a name of its own, since two processes may write the same file.
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _plain(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """The array in C order and the machine's byte order.

    safetensors.numpy writes an array's memory as it lies: that of a transposed one
    would come back in another order.
    """
    # Not np.ascontiguousarray, which gives an array () the shape (1,).
    plain = np.asarray(array, order="C")
    if plain.dtype.byteorder == ">":
        plain = plain.astype(plain.dtype.newbyteorder("="))
    if plain.dtype not in _DTYPES.values():
        raise UserError(
            f"{path} cannot be written: safetensors has no dtype {plain.dtype}, which "
            f"{name} is of; convert it first"
        )
    return plain


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins as the header's length and the JSON object after it."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length <= _MAX_HEADER_BYTES


def _read_safetensors(
    path: Path, content: bytes
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        # This compares all lengths and offsets, so that the header is JSON after it.
        tensors = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path} is a damaged or incomplete safetensors file ({error}); copy or "
            "download it again"
        ) from error
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    arrays = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in _DTYPES:
            raise UserError(
                f"{path} holds {name} in the dtype {tensor['dtype']}, which is not "
                f"read; convert it to one of {', '.join(_DTYPES)}"
            )
        flat = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]])
        try:
            arrays[name] = flat.reshape(tensor["shape"])
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"{path} holds {name} in a shape that no array has; copy or download "
                "it again"
            ) from error
    return arrays, metadata


def _accident(head: bytes) -> str | None:
    """What a file of text is, and what to do; None for a file of bytes."""
    if head.startswith(b"version https://git-lfs"):
        return (
            "is a Git LFS pointer, not the weights themselves; fetch them with git lfs "
            "pull, or download the file from its page"
        )
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"<"):
        return (
            "is a web page (HTML or XML), as servers send with an error or a log-in; "
            "download the weights again"
        )
    try:
        # Incremental, since the last character may be cut.
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return None
    line = (text.splitlines() or [""])[0]
    if not line or not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    return (
        f"is a file of text that begins {line[:60]!r}, not weights; give a safetensors "
        "file or one of torch.save"
    )
