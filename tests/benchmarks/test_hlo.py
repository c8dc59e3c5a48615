"""Counts against closed forms and against XLA's cost analysis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import hlo, switches
from resnet_jax.errors import UserError
from resnet_jax.models.convolution import convolve


def compiled_operations(function, *shapes):
    """The operations, and XLA's cost analysis."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(function).lower(*arguments).compile()
    operations = list(hlo.operations(hlo.read(compiled.as_text())))
    return operations, compiled.cost_analysis()


def total(operations, field, kinds=None):
    chosen = [o for o in operations if kinds is None or o.kind in kinds]
    return sum(getattr(operation, field) for operation in chosen)


def taps(size, kernel, strides):
    """Pairs of output and tap along an axis that meet a pixel, one by one."""
    outputs = range(-(-size // strides))
    reach = kernel // 2
    return sum(
        0 <= output * strides + tap - reach < size
        for output in outputs
        for tap in range(kernel)
    )


@pytest.mark.parametrize("strides", [1, 2])
def test_a_compiled_convolution_and_its_gradients(strides):
    images, kernel = (2, 9, 7, 4), (3, 3, 4, 6)
    output = (2, -(-9 // strides), -(-7 // strides), 6)

    def convolution(x, kernel):
        return convolve(x, kernel, strides, algorithm="xla")

    def gradients(x, kernel, dy):
        return jax.vjp(convolution, x, kernel)[1](dy)

    work = 2 * 4 * 6 * taps(9, 3, strides) * taps(7, 3, strides)
    found, cost = compiled_operations(convolution, images, kernel)
    assert total(found, "multiply_adds") == work == cost["flops"] / 2
    assert total(found, "nbytes") == cost["bytes accessed"]
    arrays = 4 * sum(map(np.prod, (images, kernel, output)))
    assert total(found, "nbytes", ["convolution"]) == arrays
    found, cost = compiled_operations(gradients, images, kernel, output)
    assert total(found, "multiply_adds") == 2 * work == cost["flops"] / 2


def test_a_loop_counts_with_its_turns():
    def powers(x, matrix):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ matrix), None), x, length=7)[0]

    found, _ = compiled_operations(powers, (16, 32), (32, 32))
    assert total(found, "multiply_adds") == 7 * 16 * 32 * 32
    assert total(found, "nbytes", ["product"]) >= 7 * 4 * (2 * 16 * 32 + 32 * 32)


HLO = """HloModule of_a_gpu

%fused (p.0: bf16[2,8,8,16], p.1: bf16[2,8,8,16]) -> bf16[2,8,8,16] {
  %p.0 = bf16[2,8,8,16]{3,2,1,0} parameter(0)
  %p.1 = bf16[2,8,8,16]{3,2,1,0} parameter(1)
  ROOT %add = bf16[2,8,8,16]{3,2,1,0} add(%p.0, %p.1)
}

ENTRY %main (x: bf16[2,8,8,4], k: bf16[3,3,4,16], s: bf16[2,8,8,16]) -> bf16[2] {
  %x = bf16[2,8,8,4]{3,2,1,0} parameter(0)
  %k = bf16[3,3,4,16]{3,2,1,0} parameter(1)
  %s = bf16[2,8,8,16]{3,2,1,0} parameter(2)
  %f = (bf16[2,8,8,16]{3,2,1,0}, u8[100]{0}) custom-call(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"
  %y = bf16[2,8,8,16]{3,2,1,0} get-tuple-element(%f), index=0
  %z = bf16[2,8,8,16]{3,2,1,0} fusion(%y, /*index=1*/%s), kind=kLoop, calls=%fused
  %dk = (bf16[3,3,4,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %z), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %dx = (bf16[2,8,8,4]{3,2,1,0}, u8[0]{0}) custom-call(%z, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardInput"
  %c = bf16[128,16]{1,0} bitcast(%z)
  %g = (f32[16,16]{1,0}, s8[0]{0}) custom-call(%c, %c), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %r = bf16[8,8,16,2]{3,2,1,0} transpose(%z), dimensions={1,2,3,0}
}
"""  # noqa: E501


def test_a_gpu_s_custom_calls_are_read():
    found = list(hlo.operations(hlo.read(HLO)))
    x, k, y = 2 * 2 * 64 * 4, 2 * 9 * 4 * 16, 2 * 2 * 64 * 16
    work = 2 * 4 * 16 * (8 * 3 - 2) ** 2
    assert [(o.kind, o.multiply_adds, o.nbytes) for o in found] == [
        ("convolution", work, x + k + y + 100),
        ("elementwise", 0, 3 * y),
        ("convolution", work, x + y + k),
        ("convolution", work, y + k + x),
        ("product", 16 * 16 * 128, y + 4 * 256),
        ("copy", 0, 2 * y),
    ]


def test_switches_are_parsed_and_faults_named():
    name, options = switches.parse_switch("all=remat:true,batch:4,dtype:bfloat16")
    assert (name, options) == ("all", {"remat": True, "batch": 4, "dtype": "bfloat16"})
    for text in ("remat:true", "x=remat", "=remat:true"):
        with pytest.raises(UserError, match="is no switch"):
            switches.parse_switch(text)
