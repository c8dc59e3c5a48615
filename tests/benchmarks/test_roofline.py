"""Counts against closed forms and against XLA's cost analysis."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import hlo, roofline
from resnet_jax.analysis.complexity import count_multiply_adds
from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.models.conv import convolve
from resnet_jax.planning.chips import Chip

CHIP = Chip("chip", 2.0, 1.0, 1.0, 10.0, 1.0, "none")


def compiled_operations(function, *shapes):
    """The operations, and XLA's cost analysis."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(function).lower(*arguments).compile()
    return roofline.compiled_operations(compiled), compiled.cost_analysis()


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


def test_a_traced_step_lies_between_the_closed_forms():
    case = roofline.Case(
        "base",
        "cifar_resnet8",
        512,
        None,
        "float32",
        {"conv_algorithm": "xla", "shortcut": "B"},
    )
    traced = roofline.summarize(
        roofline.traced_operations(case.trace().jaxpr), case, [CHIP]
    )
    maps = roofline.count_maps(create_model("cifar_resnet8", shortcut="B"), (32, 32, 3))
    # Kernels are small beside the maps of so many images.
    convolutions = traced["kinds"]["convolution"]["bytes"]
    assert convolutions == pytest.approx(4 * maps.convolutions, rel=0.01)
    best, worst = (
        4 * maps.elements(roofline.PASSES[name])
        for name in ("custom gradient", "layers apart")
    )
    assert best < traced["bytes"] < worst


def test_maps_of_a_net_by_hand():
    net = create_model("cifar_resnet8", shortcut="B")
    maps = roofline.count_maps(net, (32, 32, 3))
    first, second, third = 32 * 32 * 16, 16 * 16 * 32, 8 * 8 * 64
    convolutions = 2 * (32 * 32 * 3 + first) + 3 * (4 * first)
    convolutions += 3 * (first + second + 2 * second) + 3 * (first + second)
    convolutions += 3 * (second + third + 2 * third) + 3 * (second + third)
    assert maps == roofline.Maps(
        convolutions=convolutions,
        relu=2 * first + second + third,
        join=first + second + third,
        projection=second + third,
        input=2 * first + second,
        pooling=0,
    )
    apart = roofline.Passes(13, 16, 8, 3)
    assert roofline.PASSES["layers apart"] == apart
    assert (
        maps.elements(apart)
        == (convolutions + 13 * maps.relu + 16 * maps.join + 8 * maps.projection)
        + 3 * maps.input
    )


def test_closed_bounds_add_kernels_and_maps():
    case = roofline.Case("base", "cifar_resnet8", 8, None, "bfloat16", {})
    # So fast a chip that only bytes count, 10^9 a second.
    chip = Chip("chip", 1e9, 1e9, 1.0, 1.0, 1.0, "none")
    found = roofline.analytic(case, [chip])
    forward = count_multiply_adds(create_model("cifar_resnet8"), (32, 32, 3))
    assert found["multiply_adds"] == 3 * forward
    traced = roofline.analyse(case, [chip], compiles=False)["traced"]["kinds"]
    kernels = traced["convolution"]["bytes"] + traced["product"]["bytes"]
    for row in found["passes"].values():
        nbytes = kernels + row["bytes"] - found["convolution_bytes"]
        assert 1e9 / row["images_per_second"]["chip"] == pytest.approx(nbytes)


def test_an_imagenet_net_has_a_pooled_stem():
    maps = roofline.count_maps(create_model("resnet18"), (64, 64, 3))
    assert maps.pooling == 3 * (32 * 32 + 16 * 16) * 64


def test_nets_without_such_maps_are_refused():
    with pytest.raises(UserError, match="post-activation only"):
        roofline.count_maps(create_model("cifar_preact_resnet20"), (32, 32, 3))


def test_a_step_is_traced_and_compiled():
    case = roofline.Case(
        "base", "cifar_resnet8", 4, None, "float32", {"conv_algorithm": "xla"}
    )
    row = roofline.analyse(case, [CHIP], compiles=True)
    forward = count_multiply_adds(create_model("cifar_resnet8"), (32, 32, 3))
    by_images = 32 * 32 * 27 * 16  # there is no gradient by them
    assert row["traced"]["multiply_adds"] == 3 * forward - by_images
    compiled = row["compiled"]
    # The compiler leaves out taps on the padding.
    assert 0.9 < compiled["multiply_adds"] / row["traced"]["multiply_adds"] < 1
    assert compiled["bytes"] == pytest.approx(compiled["xla_bytes"], rel=1e-3)
    assert compiled["multiply_adds"] < compiled["xla_flops"] / 2


def test_the_bound_adds_up_the_longer_times():
    found = [
        hlo.Operation("convolution", "a", 10**12, 10**9),  # 2 s or 0.1 s
        hlo.Operation("elementwise", "b", 0, 5 * 10**9),  # 0.5 s
    ]
    assert roofline.bound_seconds(found, CHIP, "float32") == pytest.approx(2.5)
    assert roofline.bound_seconds(found, CHIP, "bfloat16") == pytest.approx(1.5)


def test_what_moves_most_is_named():
    found = [
        hlo.Operation("elementwise", "add_fusion.12", 0, 30),
        hlo.Operation("elementwise", "add_fusion", 0, 30),
        hlo.Operation("reduction", "reduce_sum float32", 0, 40),
    ]
    assert roofline.largest(found, batch=2, count=1) == [
        {"name": "add_fusion", "operations": 2, "bytes": 30}
    ]


def test_switches_are_parsed_and_faults_named():
    name, options = roofline.parse_switch("all=remat:true,batch:4,dtype:bfloat16")
    assert (name, options) == ("all", {"remat": True, "batch": 4, "dtype": "bfloat16"})
    for text in ("remat:true", "x=remat", "=remat:true"):
        with pytest.raises(UserError, match="is no switch"):
            roofline.parse_switch(text)
    with pytest.raises(UserError, match="together"):
        roofline.main(["--tflops", "790"])


def test_switches_stand_side_by_side(tmp_path, capsys):
    file = tmp_path / "roofline.json"
    command = "--model cifar_resnet8 --batch 8 --tflops 790 --bandwidth 4300 --largest"
    command += f" --compare half=dtype:float32 --json {file}"
    roofline.main(command.split())
    base, full = json.loads(file.read_text())["rows"]
    assert full["dtype"] == "float32"
    assert full["traced"]["multiply_adds"] == base["traced"]["multiply_adds"]
    ratio = full["traced"]["bytes"] / base["traced"]["bytes"]
    assert ratio == pytest.approx(2, rel=0.1)
    output = capsys.readouterr().out
    assert "custom gradient" in output
    assert "conv_general_dilated bfloat16" in output


@pytest.mark.parametrize("folded", [False, True])
def test_inference_is_the_forward_pass_alone(folded):
    case = roofline.Case(
        "a", "cifar_resnet8", 4, None, "bfloat16", {"conv_algorithm": "xla"}, True
    )
    case = case.switched("b", {"folded": folded})
    traced = case.trace()
    row = roofline.summarize(roofline.traced_operations(traced.jaxpr), case, [])
    net = create_model("cifar_resnet8")
    assert row["multiply_adds"] == count_multiply_adds(net, (32, 32, 3))
    assert ("rsqrt" in str(traced.jaxpr)) != folded
