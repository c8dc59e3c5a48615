"""Read and write files of weights. The content decides the format, not the name.

``read_arrays`` reads safetensors and torch.save files. ``write_safetensors`` writes
safetensors, which every library reads and which cannot hold a program.
"""

import codecs
import json
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from resnet_jax.errors import UserError
from resnet_jax.storage import replacing
from resnet_jax.weights.torch_files import printable, read_torch_file

# safetensors.numpy reads no bfloat16 in some versions.
_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# The longest header that safetensors itself accepts.
_MAX_HEADER_BYTES = 100_000_000

# Downloads that went wrong, by their first bytes.
_ACCIDENTS = {
    b"version https://git-lfs": (
        "is a Git LFS pointer, not the weights themselves; fetch them with git lfs "
        "pull, or download the file from its page"
    ),
    b"<": (
        "is a web page (HTML or XML), which servers send for errors and log-ins; "
        "download the weights again"
    ),
}


def read_arrays(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the arrays of a file of weights, and its metadata.

    Args:
      path: a safetensors or torch.save file (see ``read_torch_file``).

    Returns:
      Arrays by name, C-contiguous and in the file's dtype (``ml_dtypes.bfloat16`` for
      bfloat16); and the metadata, which only safetensors files have.

    Raises:
      UserError: the file cannot be read, is damaged or has another format.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if _is_safetensors(head):
            return _read_safetensors(path, path.read_bytes())
        for start, sentence in _ACCIDENTS.items():
            if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(start):
                raise UserError(f"{path} {sentence}")
        return read_torch_file(path), {}
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the path of a file of "
            "weights that you may read"
        ) from error


def write_safetensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays as a safetensors file, complete or not at all.

    Args:
      path: the file; an existing one is replaced in one step.
      arrays: by name, with any strides and byte order.
      metadata: strings to save with them.

    Raises:
      UserError: the folder is missing, the file cannot be written, or an array has a
        dtype that is not supported.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(
            f"{path} cannot be written: there is no folder {path.parent}; create it, "
            "or give another path"
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


def _plain(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """The array in C order and native byte order.

    safetensors.numpy writes an array's memory as it is, so a transposed array would
    load in another order.
    """
    # np.ascontiguousarray would change the shape () to (1,).
    plain = np.asarray(array, order="C")
    if plain.dtype.byteorder == ">":
        plain = plain.astype(plain.dtype.newbyteorder("="))
    if plain.dtype not in _DTYPES.values():
        raise UserError(
            f"{path} cannot be written: {name} has the dtype {plain.dtype}, which is "
            "not supported; convert it first"
        )
    return plain


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with a header's length and a JSON object."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length <= _MAX_HEADER_BYTES


def _read_safetensors(
    path: Path, content: bytes
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        # This checks all lengths and offsets, and that the header is JSON.
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
                f"{path} holds {printable(name)} in the dtype {tensor['dtype']}, which "
                f"is not supported; convert it to one of {', '.join(_DTYPES)}"
            )
        flat = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]])
        try:
            arrays[name] = flat.reshape(tensor["shape"])
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"{path} holds {printable(name)} in an impossible shape; copy or "
                "download it again"
            ) from error
    return arrays, metadata
