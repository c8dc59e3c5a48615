"""Ensembles from config files."""

from typing import Any

from resnet_jax.config.files import run_config_file
from resnet_jax.errors import UserError
from resnet_jax.evaluation.protocols import Average


def read_ensemble(spec: str) -> tuple[list[tuple[str, str | None]], Average]:
    """The nets of an ensemble with their protocols, and how they are averaged.

    Args:
      spec: ``PATH`` or ``PATH:ARG`` of a file such as configs/ensemble.py.

    Raises:
      UserError: the file is missing, fails or returns something else.
    """
    values = run_config_file(spec, {})
    average, members = values.get("average", "probabilities"), values.get("members")
    if average not in ("probabilities", "logits"):
        raise UserError(
            f"{spec}: average must be probabilities or logits, not {average!r}"
        )
    if not isinstance(members, (list, tuple)) or not members:
        raise UserError(f"{spec}: members must list (weights, protocol) pairs")
    return [_member(spec, member) for member in members], average


def _member(spec: str, member: Any) -> tuple[str, str | None]:
    if isinstance(member, str):
        return member, None
    if isinstance(member, (list, tuple)) and len(member) == 2:
        weights, protocol = member
        if isinstance(weights, str) and (protocol is None or isinstance(protocol, str)):
            return weights, protocol
    raise UserError(
        f"{spec}: a member is {member!r:.80}; expected weights, or a pair of weights "
        "and protocol"
    )
