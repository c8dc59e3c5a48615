"""The platform that a net is traced for: some layers compute differently on each."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "platform", default=None
)


def platform() -> str:
    """One of "cpu", "gpu" and "tpu": from ``compiling_for``, else of this process."""
    return _chosen.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Traces the nets inside for a platform that this process need not have."""
    token = _chosen.set(platform)
    try:
        yield
    finally:
        _chosen.reset(token)
