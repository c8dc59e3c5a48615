"""Keeps compiled programs in a folder, so that a restart does not compile again."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def compiled_programs_in(folder: Path | None) -> Iterator[None]:
    """Uses a folder as jax's compilation cache within the block.

    A cache that the process already uses, such as JAX_COMPILATION_CACHE_DIR, stays.

    Args:
      folder: made if it is missing; None means no cache.
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
