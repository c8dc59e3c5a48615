"""Compiled programs on the disk, so that a restart need not compile again."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def compiled_programs_in(folder: Path | None) -> Iterator[None]:
    """Keeps what is compiled meanwhile in a folder, and takes it from there.

    A folder that the process already has, such as JAX_COMPILATION_CACHE_DIR, stays.

    Args:
      folder: made where it is missing; None: nothing is kept.
    """
    if folder is None or jax.config.values["jax_compilation_cache_dir"]:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # jax decides once, at its first compilation, whether there is a cache.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
