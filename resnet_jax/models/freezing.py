"""Parts of a net that training leaves as they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from resnet_jax.errors import UserError, nearest


def trainable_mask(params: Mapping[str, Any], frozen: Sequence[str]) -> dict[str, Any]:
    """A tree of booleans like ``params``: False in the frozen parts.

    For ``optax``: updates of frozen parameters, weight decay included, are zero with
    ``optax.multi_transform``, labelled by this mask. To keep the running statistics of
    the same parts too, build the net with ``batch_norm_frozen=frozen``.

    Args:
      params: the net's parameters.
      frozen: names of parts, ("stem", "stage1"), or paths within, "stage1/block1".

    Raises:
      UserError: a part that the net has not.
    """
    mask = jax.tree.map(lambda leaf: True, dict(params))
    for part in frozen:
        _freeze(mask, part.split("/"), part)
    return mask


def _freeze(mask: dict[str, Any], path: Sequence[str], part: str) -> None:
    name, *rest = path
    if name not in mask:
        raise UserError(f"there is no part {part!r} to freeze; {nearest(name, mask)}")
    if not rest:
        mask[name] = jax.tree.map(lambda leaf: False, mask[name])
    elif isinstance(mask[name], dict):
        _freeze(mask[name], rest, part)
    else:
        raise UserError(
            f"there is no part {part!r} to freeze; {name} is an array, without parts"
        )
