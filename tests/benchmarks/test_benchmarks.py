"""Each script runs once at its smallest, and its arithmetic is that of closed forms."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import (
    compare,
    contenders,
    gpu,
    hlo,
    input_pipeline,
    paper_report,
    peers,
    program,
)
from resnet_jax.analysis.complexity import (
    abstract_variables,
    count_multiply_adds,
    count_parameters,
)
from resnet_jax.models import catalog_entry
from tests.conftest import REPOSITORY

# torchvision's published counts; for the CIFAR nets, the definition's.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnet152": 60_192_808,
    "cifar_resnet8": 78_042,
    "cifar_resnet20": 272_474,
}
SMALL = ["--model", "cifar_resnet8", "--batch", "4", "--rounds", "1", "--steps", "1"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_peers_are_the_published_nets(name):
    layout = peers.LAYOUTS[name]
    shape = (layout.image_size, layout.image_size, 3)
    net = peers.FlaxResNet(layout)
    variables = abstract_variables(net, shape)
    assert count_parameters(variables["params"]) == PARAMETERS[name]
    if name == "resnet50":
        assert count_multiply_adds(net, shape) == catalog_entry(name).multiply_adds


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_torch_peers_have_the_same_parameters(name):
    torch = pytest.importorskip("torch")
    from benchmarks.peers_torch import TorchResNet

    with torch.device("meta"):
        net = TorchResNet(peers.LAYOUTS[name])
    assert sum(weight.numel() for weight in net.parameters()) == PARAMETERS[name]


def run_compare(tmp_path, capsys, *arguments):
    file = tmp_path / "result.json"
    compare.main([*arguments, "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["command"].startswith("python -m benchmarks.compare ")
    assert {"jax", "cpu", "commit"} <= result["environment"].keys()
    rows = {row["name"]: row for row in result["contenders"]}
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert name in printed
        assert row["images_per_second"] > 0
    return rows


@pytest.mark.parametrize(
    ("case", "ours"),
    [
        ("train_step", ["resnet_jax"]),
        pytest.param(
            "forward_backward",
            ["resnet_jax", "resnet_jax_xla"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_three_libraries_side_by_side(one_device, case, ours, tmp_path, capsys):
    pytest.importorskip("torch")
    rows = run_compare(tmp_path, capsys, case, *SMALL)
    assert list(rows) == [*ours, "flax_example", "torch", "torch_channels_last"]
    for name, row in rows.items():
        assert row["finite"]
        assert row["parameters"] == (75_290 if name in ours else 78_042)


def test_inference_side_by_side(one_device, tmp_path, capsys):
    pytest.importorskip("torch")
    rows = run_compare(tmp_path, capsys, "inference", *SMALL)
    others = ["flax_example", "torch", "torch_channels_last"]
    assert list(rows) == ["resnet_jax", "resnet_jax_unfolded", *others]
    assert all(row["finite"] for row in rows.values())
    # Scale and offset of 7 normalisations become the biases of their convolutions.
    channels = 16 + 2 * (16 + 32 + 64)
    assert rows["resnet_jax_unfolded"]["parameters"] == 75_290
    assert rows["resnet_jax"]["parameters"] == 75_290 - channels
    # Torch folds those of the two projections too.
    assert rows["flax_example"]["parameters"] == 78_042
    assert rows["torch"]["parameters"] == 78_042 - channels - 32 - 64


@pytest.mark.slow
def test_options_side_by_side(one_device, tmp_path, capsys):
    rows = run_compare(tmp_path, capsys, "options", *SMALL)
    assert list(rows) == ["resnet_jax", *compare.FORMS]


@pytest.mark.slow
def test_the_loop_beside_its_bare_step(one_device, tfds_dir, tmp_path, capsys):
    arguments = [*SMALL, "--data-dir", tfds_dir, "--rounds", "2", "--steps", "2"]
    arguments += ["--batch", "8"]  # divides over the simulated devices
    rows = run_compare(tmp_path, capsys, "loop", *arguments)
    assert list(rows) == ["bare_step", "train"]
    assert len(rows["train"]["milliseconds_of_rounds"]) == 2


@pytest.fixture
def one_device(monkeypatch):
    """A comparison needs one device; the tests simulate several."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_ratios_are_medians_of_the_rounds_ratios():
    """The machine slows down tenfold: the ratio of the medians would be 20."""
    times = {"ours": [1.0, 1.0, 10.0], "other": [2.0, 20.0, 20.0]}
    rows = compare.summarize(times, batch=8)
    assert [row["time_ratio"] for row in rows] == [1.0, 2.0]
    assert rows[0]["images_per_second"] == 8000.0


def test_the_interval_of_a_median_is_that_of_its_order_statistics():
    """Of 101 values: ranks 41 and 61 by the binomial distribution, give or take 1."""
    low, high = compare.median_interval(range(1, 102))
    assert low == pytest.approx(41, abs=1)
    assert high == pytest.approx(61, abs=1)


def test_a_bare_turn_stands_around_each_window():
    turns = compare.Turns(float, window=10, windows=2)
    for step in (5, 10, 20, 30, 40):
        turns.write(f"step {step}/40")
    assert (len(turns.loop), turns.bare) == (2, [10.0] * 3)


def test_gpu_windows_are_whole_calls(monkeypatch):
    """A step of 2 ms in calls of 4: windows of 5 calls for 40 ms."""
    clock = [0.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: clock[0])

    class Fake:
        unit, facts = 4, {"parameters": 1}

        def run(self, steps):
            clock[0] += 0.002 * 4 * -(-steps // 4)
            return True

    row = gpu.measured(Fake(), 128, gpu.Size(window_seconds=0.0399), 0.0)
    assert row["steps_a_window"] == 20
    assert row["milliseconds"] == pytest.approx(2.0)
    assert row["images_per_second"] == pytest.approx(64_000)


def test_a_trace_is_attributed_also_inside_graphs():
    operations = [
        hlo.Operation("convolution", "cudnn-conv.1", 1000),
        hlo.Operation("reduction", "input_reduce_fusion.2", 300),
    ]
    launches = [
        ("cudnn-conv.1", "Memset 3", 1.0),
        ("cudnn-conv.1", "sm90_conv", 3.0),
        ("command_buffer.7", "input_reduce_fusion_2", 0.5),
        ("command_buffer.8", "input_reduce_fusion_2", 0.7),
        ("command_buffer.8", "memcpy128", 0.1),
    ]
    kinds = hlo.sums_by_kind(hlo.attributed(2 * launches, operations, steps=2))
    assert list(kinds) == ["convolution", "reduction", "unknown"]
    assert kinds["convolution"]["bytes"] == 1000
    assert kinds["convolution"]["gigabytes_per_second"] == pytest.approx(1000 / 4 / 1e3)
    assert kinds["reduction"]["count"] == 2
    assert kinds["reduction"]["bytes"] == 600
    assert kinds["reduction"]["microseconds"] == pytest.approx(1.2)


def test_a_fault_is_one_line_without_paths():
    text = """  File "/opt/x/training.py", line 180, in block_until_ready
jax.errors.JaxRuntimeError: UNKNOWN: <unknown cudnn status: 5003>
in external/xla+/xla/cuda_dnn.cc(5245): 'status' [executable_name='train_steps']
"""
    expected = "jax.errors.JaxRuntimeError: UNKNOWN: <unknown cudnn status: 5003>"
    assert gpu.fault_line(text) == expected
    assert gpu.fault_line("ValueError: no /a/b/c.txt here") == "ValueError: no ... here"


def test_the_gpu_plan_begins_with_what_matters():
    cases = gpu.plan(tiny=False)
    assert [case.framework for case in cases[1:4]] == ["ours", "flax", "torch"]
    names = [
        (case.kind, case.framework, case.name, case.precision, case.model)
        for case in cases
    ]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_a_gpu_trial_measures_every_case(tmp_path):
    pytest.importorskip("torch")
    gpu.main(["--tiny", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert len(rows) == len(gpu.plan(tiny=True)) + 1
    assert [row["status"] for row in rows[:3]] == ["measured", "measured", "traced"]
    for row in rows[3:]:
        assert row["status"] == "measured", row
        assert row["images_per_second"] > 0
    assert (tmp_path / "hlo_default.txt.gz").exists()
    assert (tmp_path / "operations_default.json").exists()


@pytest.mark.slow
def test_the_paper_s_nets_train_and_are_reported(tfds_dir, tmp_path, capsys):
    arguments = ["--paper", "--tiny", "--data", "digits", "--out", str(tmp_path)]
    overrides = {"data.data_dir": tfds_dir, "training.steps": 2}
    overrides |= {"training.global_batch_size": 8, "model.name": "cifar_resnet8"}
    for field, value in overrides.items():
        arguments += ["--override", f"{field}={value}"]
    gpu.main(arguments)
    assert "| plain-20 |" in capsys.readouterr().out


def test_bytes_of_a_compiled_program_are_xla_s():
    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = (2, 9, 7, 4), (3, 3, 4, 6)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(convolution).lower(*arguments).compile()
    found = hlo.by_kind(hlo.operations(hlo.read(compiled.as_text())))
    total = sum(nbytes for _, nbytes in found.values())
    assert total == compiled.cost_analysis()["bytes accessed"]
    arrays = 4 * sum(map(np.prod, (*shapes, (2, 5, 4, 6))))
    assert found["convolution"] == (1, arrays)


def test_of_an_array_that_is_only_sliced_the_slice_counts():
    compiled = jax.jit(lambda x: 2 * x[8:16].T).lower(jnp.ones((64, 32))).compile()
    found = hlo.by_kind(hlo.operations(hlo.read(compiled.as_text())))
    _, nbytes = found["elementwise"]
    assert nbytes == pytest.approx(2 * 4 * 8 * 32, abs=8)  # and the constant


def test_the_options_of_a_form():
    assert contenders.parse_options("default") == {}
    expected = {"fused_norm": False, "conv_algorithm": "xla"}
    assert contenders.parse_options("fused_norm=false,conv_algorithm=xla") == expected
    with pytest.raises(SystemExit, match="'fast' is no form"):
        contenders.parse_options("fast")


def test_a_loop_counts_once_per_iteration():
    def powers(x, matrix):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ matrix), None), x, length=7)[0]

    compiled = jax.jit(powers).lower(jnp.ones((16, 32)), jnp.ones((32, 32))).compile()
    found = hlo.by_kind(hlo.operations(hlo.read(compiled.as_text())))
    assert found["product"][1] >= 7 * 4 * (2 * 16 * 32 + 32 * 32)


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
  %c = bf16[128,16]{1,0} bitcast(%z)
  %g = (f32[16,16]{1,0}, s8[0]{0}) custom-call(%c, %c), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}}
  ROOT %r = bf16[8,8,16,2]{3,2,1,0} transpose(%z), dimensions={1,2,3,0}
}
"""  # noqa: E501


def test_a_gpu_s_custom_calls_are_read():
    found = list(hlo.operations(hlo.read(HLO)))
    x, k, y = 2 * 2 * 64 * 4, 2 * 9 * 4 * 16, 2 * 2 * 64 * 16
    assert [(o.kind, o.nbytes) for o in found] == [
        ("convolution", x + k + y + 100),
        ("elementwise", 3 * y),
        ("product", y + 4 * 256),
        ("copy", 2 * y),
    ]


@pytest.mark.slow
def test_training_steps_are_counted(tmp_path, capsys):
    file = tmp_path / "program.json"
    forms = ["default", "fused_norm=false", "flax"]
    arguments = ["cifar_resnet8", "--batch", "4", "--largest", "2", "--forms", *forms]
    program.main([*arguments, "--json", str(file)])
    assert "convolution" in capsys.readouterr().out
    found = json.loads(file.read_text())["forms"]
    assert list(found) == forms
    for form in found.values():
        assert form["kinds"]["all"]["megabytes_per_image"] > 0
        assert len(form["largest"]) == 2


def test_input_pipelines_side_by_side(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "ab":
        folder = tmp_path / "data" / "val" / name
        folder.mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.jpg")
    file = tmp_path / "result.json"
    arguments = f"--images {folder.parent} --batch 4 --rounds 1 --batches 1 --json"
    input_pipeline.main([*arguments.split(), str(file)])
    rows = {row["name"]: row for row in json.loads(file.read_text())["contenders"]}
    assert rows["resnet_jax"]["ours_over_this"] == 1
    assert "resnet_jax, prepared" in rows
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


STORED = sorted(
    file.parent for file in (REPOSITORY / "benchmarks" / "results").glob("*/report.md")
)


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_stored_reports_are_what_the_command_writes(folder, tmp_path):
    for name in ("results.jsonl", "metrics.jsonl"):
        shutil.copy(folder / name, tmp_path)
    figure = tmp_path / "figure.png"
    paper_report.main([str(tmp_path), "--figure", str(figure)])
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()
    assert figure.read_bytes()[:4] == b"\x89PNG"
