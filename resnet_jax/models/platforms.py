"""The platform that a net is traced for: some layers compute differently on each."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

PLATFORMS = ("cpu", "gpu", "tpu")

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "platform", default=None
)


def platform() -> str:
    """One of ``PLATFORMS``: from ``compiling_for``, else of this process."""
    return _chosen.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Traces the nets inside for "cpu", "gpu" or "tpu", which need not be there.

    jax remembers what it has traced: a function that was traced before keeps its
    program. Wrap it in a new function, or call ``jax.clear_caches()``.

    Raises:
      ValueError: another platform.
    """
    if platform not in PLATFORMS:
        raise ValueError(
            f"the platform is one of {', '.join(PLATFORMS)}, not {platform!r}"
        )
    token = _chosen.set(platform)
    try:
        yield
    finally:
        _chosen.reset(token)
