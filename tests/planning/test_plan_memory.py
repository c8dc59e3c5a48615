"""The plan's memory against closed forms and against what XLA's compiler reports."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.plan_memory import CASES, compare
from resnet_jax.planning.memory import ACCELERATOR, XLA_CPU, Compiler, Memory
from resnet_jax.planning.program import flatten_program

MAP = 64 * 32 * 4  # bytes of (64, 32) float32


def memory_of(function, *shapes, compiler=ACCELERATOR):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    traced = jax.jit(function).trace(*arguments)
    return Memory(flatten_program(traced.jaxpr, compiler.keeps_barriers), compiler)


@pytest.fixture
def fresh_compilation():
    """No program of the cache: its statistics are not all kept there."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def test_elementwise_chains_take_no_memory():
    def chain(x, y):
        return jnp.sum(jnp.square(jnp.maximum(2 * x + y, 0) - 1))

    memory = memory_of(chain, (64, 32), (64, 32))
    assert memory.peak().nbytes == 0
    # Both are read once, and a scalar is written.
    assert memory.traffic() == 2 * MAP + 4


def test_matrix_products_read_and_write_arrays():
    def layers(x, first, second):
        return jnp.maximum(x @ first, 0) @ second

    memory = memory_of(layers, (64, 32), (32, 32), (32, 32))
    # The product's result, in whose place its positive part lies.
    assert memory.peak().nbytes == MAP
    kernels = 2 * 32 * 32 * 4
    # x, result, result, positive part, positive part, output; and two kernels.
    assert memory.traffic() == 6 * MAP + kernels


def test_what_is_kept_for_the_gradient():
    def loss(x, kernels):
        for kernel in kernels:
            x = jnp.maximum(x @ kernel, 0)
        return jnp.sum(jnp.square(x))

    def gradients(x, *kernels):
        return jax.grad(loss, argnums=1)(x, kernels)

    deep = memory_of(gradients, (64, 32), *[(32, 32)] * 6).peak().nbytes
    shallow = memory_of(gradients, (64, 32), *[(32, 32)] * 3).peak().nbytes
    # Each layer keeps its product, whose sign the gradient needs, and the operand of
    # the next product.
    assert deep - shallow == 3 * 2 * MAP


def test_loops_stack_what_their_gradient_needs():
    def loss(x, kernels):
        x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)
        return jnp.sum(x)

    gradient = jax.grad(loss, argnums=1)
    few = memory_of(gradient, (64, 32), (4, 32, 32)).peak().nbytes
    many = memory_of(gradient, (64, 32), (8, 32, 32)).peak().nbytes
    kept, odd = divmod(many - few, 4 * MAP)
    assert odd == 0
    assert 1 <= kept <= 3  # the operand, and what tanh's derivative needs


def test_rematerialisation_saves_memory_where_barriers_are_kept():
    def block(x, kernel):
        return jnp.tanh(jnp.tanh(jnp.tanh(x @ kernel) @ kernel) @ kernel)

    def gradient(apply):
        def loss(kernels, x):
            for kernel in kernels:
                x = apply(x, kernel)
            return jnp.sum(x)

        return lambda x, *kernels: jax.grad(loss)(kernels, x)

    def maps_a_block(apply, compiler=ACCELERATOR):
        few, many = (
            memory_of(gradient(apply), (64, 32), *[(32, 32)] * n, compiler=compiler)
            for n in (8, 16)
        )
        return (many.peak().nbytes - few.peak().nbytes) / (8 * MAP)

    again = jax.checkpoint(block)
    assert maps_a_block(block) == 3
    assert maps_a_block(again) == 1
    merging = Compiler(fuses_reductions=True, keeps_barriers=False)
    assert maps_a_block(again, merging) == 3


def test_a_library_reduces_arrays():
    def moments(x):
        centred = x - jnp.mean(x, 0)
        return jnp.mean(jnp.square(centred), 0)

    fused = memory_of(moments, (64, 32)).peak().nbytes
    stored = memory_of(moments, (64, 32), compiler=XLA_CPU).peak().nbytes
    assert fused < MAP / 8
    assert stored - fused == pytest.approx(MAP, rel=0.05)


def test_the_compiler_reports_as_much(fresh_compilation):
    row = compare("cifar_resnet8", 16, 32, {"conv_algorithm": "xla"})
    assert row["ratio"] == pytest.approx(1, abs=0.15)
    # Temporaries are most of it, so that these are what is compared.
    assert row["compiler_temporaries"] > 0.7 * row["compiler_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", CASES[:12], ids=lambda case: "-".join(map(str, case[:3]))
)
def test_the_compiler_reports_as_much_of_larger_nets(fresh_compilation, case):
    assert compare(*case)["ratio"] == pytest.approx(1, abs=0.15)
