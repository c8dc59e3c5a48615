"""The script runs as a trial, and says of each case what became of it."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from benchmarks import gpu_contenders, gpu_training, processes
from benchmarks.gpu_contenders import SWITCHES, Case
from resnet_jax.models import create_model


def test_the_plan_begins_with_what_matters():
    cases = gpu_training.plan(
        ["resnet50", "resnet18"],
        [256, 128],
        gpu_training.FRAMEWORKS,
        ["default", "remat"],
        images="folder",
    )
    first = [(case.framework, case.way) for case in cases[:11]]
    assert first == [
        ("ours", "default"),
        ("torch", "compiled"),
        ("torch", "eager"),
        ("flax", "jitted"),
        ("ours", "inference"),
        ("ours", "folded"),
        ("torch", "folded, compiled"),
        ("torch", "folded, eager"),
        ("ours", "end to end"),
        ("ours", "input alone"),
        ("ours", "remat"),
    ]
    assert all((case.model, case.batch) == ("resnet50", 256) for case in cases[:11])
    # Four contenders for each net and batch; the rest once.
    assert len(cases) == 4 * 4 + 7
    assert len(set(cases)) == len(cases)


def test_switches_are_options_of_the_net_and_known_flags():
    for switch in SWITCHES.values():
        options = dict(switch.options)
        options.pop("dtype", None)
        create_model("resnet50", **options)
    # One jaxlib in the range that is supported may lack some, but not all.
    assert processes.knows(SWITCHES["no graphs"].flags)
    assert not processes.knows("--xla_gpu_no_such_flag=true")


def test_a_case_that_fails_or_takes_too_long_says_so():
    row = gpu_training.measure(
        Case("ours", "cifar_resnet7", 4, "default"), tiny=True, seconds=300
    )
    assert "cifar_resnet7" in row["status"]
    late = Case("ours", "cifar_resnet8", 4, "default")
    row = gpu_training.measure(late, tiny=True, seconds=1.5)
    assert row["status"] == "not measured: out of time"
    row = gpu_training.measure(late, tiny=True, seconds=0)
    assert row["status"] == "not measured: out of time"


def test_torch_s_net_is_torchvision_s_where_it_is_installed(monkeypatch):
    pytest.importorskip("torch")
    models = types.SimpleNamespace(resnet18=lambda: "a net")
    library = types.ModuleType("torchvision")
    library.models, library.__version__ = models, "1.2"
    monkeypatch.setitem(sys.modules, "torchvision", library)
    assert gpu_contenders.torch_net("resnet18") == ("a net", "torchvision 1.2")
    # None in sys.modules is what is not installed.
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    net, source = gpu_contenders.torch_net("resnet50")
    assert source == "benchmarks/peers_torch.py"
    assert sum(weight.numel() for weight in net.parameters()) == 25_557_032


@pytest.mark.slow
def test_a_trial_measures_every_case_that_it_can(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "ab":
        folder = tmp_path / "val" / name
        folder.mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.jpg")
    file = tmp_path / "result.json"
    command = f"--tiny --images {tmp_path / 'val'} --json {file}"
    gpu_training.main(command.split())
    rows = json.loads(file.read_text())["rows"]
    assert [(row["framework"], row["way"]) for row in rows] == [
        ("ours", "default"),
        ("torch", "eager"),
        ("flax", "jitted"),
        ("ours", "inference"),
        ("ours", "folded"),
        ("torch", "folded, eager"),
        ("ours", "end to end"),
        ("ours", "input alone"),
    ]
    output = capsys.readouterr().out
    for row in rows:
        assert row["way"] in output
        if row["framework"] == "torch" and "torch" in row["status"]:
            assert "No module named 'torch'" in row["status"]
            continue
        assert row["status"] == "measured", row
        assert row["images_per_second"] > 0
        assert len(row["window_seconds"]) == 2
    parameters = {"ours": 75_290, "torch": 78_042, "flax": 78_042}
    for row in rows[:3]:
        if row["status"] == "measured":
            assert row["parameters"] == parameters[row["framework"]]
    assert rows[0]["xla_bytes_an_image"] > 0
