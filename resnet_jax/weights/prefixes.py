"""Prefixes that training code puts before torch's names: "module.conv1.weight".

Data parallelism, torch.compile, Lightning and self-supervised methods keep the net in a
field of another module, whose name comes first in every name of the file.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from resnet_jax.weights.torch_files import printable

_Array = TypeVar("_Array")

# Fields that hold the one net of a file.
_WRAPPERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "model",
    "net",
    "network",
    "resnet",
    "backbone",
    "encoder",
)
_KNOWN = re.compile(rf"(?:(?:{'|'.join(_WRAPPERS)})\.)*")

# The first convolution of any net with torch's names, unless a block's own.
_FIRST = re.compile(r"(.*\.|)(?:conv1|conv1\.0|features\.0)\.weight")
_IN_BLOCK = re.compile(r"(?:.*\.)?layer\d+\.\d+\.")


def unwrapped(arrays: Mapping[str, _Array]) -> dict[str, _Array]:
    """The arrays without the known prefix of the net's names, if there is one net.

    Other names stay as they are.
    """
    prefixes = seen_prefixes(arrays)
    if not prefixes:
        # Part of a net, without its first convolution.
        prefixes = list({_known(name) for name in arrays})
    if len(prefixes) != 1 or _known(prefixes[0]) != prefixes[0]:
        return dict(arrays)
    stripped = {name.removeprefix(prefixes[0]): a for name, a in arrays.items()}
    return stripped if len(stripped) == len(arrays) else dict(arrays)


def seen_prefixes(arrays: Mapping[str, object]) -> list[str]:
    """What stands before each net's first convolution; "" for a net without prefix."""
    found = [match[1] for name in arrays if (match := _FIRST.fullmatch(name))]
    return [prefix for prefix in sorted(found) if not _IN_BLOCK.fullmatch(prefix)]


def without_prefix(arrays: Mapping[str, _Array], prefix: str) -> dict[str, _Array]:
    """The arrays whose names begin with a prefix, without it."""
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def shown(prefixes: list[str], separator: str = ", ") -> str:
    """Prefixes for a sentence: "module.encoder_q., module.encoder_k."."""
    more = ", ..." if len(prefixes) > 4 else ""
    return separator.join(printable(prefix) for prefix in prefixes[:4]) + more


def _known(name: str) -> str:
    """The known wrappers at the start of a name."""
    match = _KNOWN.match(name)
    return match[0] if match else ""
