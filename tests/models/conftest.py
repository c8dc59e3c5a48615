"""What holds for all tests of the models."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Tests run a program once or twice: compiling it well would be most of the time.

    Not so the comparisons of whole nets, in float64 whose programs run long, and in
    bfloat16 as users compile it.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    is_long = request.module.__name__.startswith("test_against_")
    jax.config.update("jax_disable_most_optimizations", not is_long)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
