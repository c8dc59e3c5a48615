"""The measurements of nets run and write what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def run(module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_forward_backward_writes_every_contender(tmp_path):
    file = tmp_path / "result.json"
    arguments = "--model cifar_resnet8 --batch 4 --rounds 1 --steps 1 --json"
    printed = run("forward_backward", *arguments.split(), str(file))
    result = json.loads(file.read_text())
    rows = {row["name"]: row for row in result["contenders"]}
    ours = {"resnet_jax", "resnet_jax_xla"}
    assert set(rows) == ours | {"flax_example", "torch", "torch_channels_last"}
    for name, row in rows.items():
        assert name in printed
        if row["status"] == "not installed":
            assert name.startswith("torch")
            continue
        assert row["status"] == "measured"
        assert row["parameters"] == (75_290 if name in ours else 78_042)
        assert row["milliseconds"] > 0


@pytest.mark.slow
def test_deep_nets_writes_every_form_and_stops_at_its_limit(tmp_path):
    file = tmp_path / "result.json"
    arguments = "--depths 8 --batch 2 --steps 1 --json"
    printed = run("deep_nets", *arguments.split(), str(file))
    rows = json.loads(file.read_text())["rows"]
    assert [row["form"] for row in rows] == ["unrolled", "scanned", "scanned, remat"]
    for row in rows:
        assert row["form"] in printed
        assert row["status"] == "measured"
        assert min(row["compile_seconds"], row["step_seconds"], row["peak_gib"]) > 0

    arguments = "--depths 8 --batch 2 --limit 1 --json"
    run("deep_nets", *arguments.split(), str(file))
    rows = json.loads(file.read_text())["rows"]
    assert {row["status"] for row in rows} == {"stopped after 1 s"}


@pytest.mark.slow
def test_sharded_memory_writes_what_the_devices_hold(tmp_path):
    file = tmp_path / "result.json"
    arguments = "--model cifar_resnet8 --batch 32 --size 32 --devices 4 --json"
    printed = run("sharded_memory", *arguments.split(), str(file))
    rows = {row["form"]: row for row in json.loads(file.read_text())["rows"]}
    assert all(form in printed for form in rows)
    # What is cut are the kernels of 4608 elements and more, and their velocities:
    # 3x3 of 16 x 32, 32 x 32, 32 x 64 and 64 x 64.
    cut = 9 * (16 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
    saved = (
        rows["replicated"]["argument_bytes"] - rows["fully sharded"]["argument_bytes"]
    )
    assert saved == 2 * 4 * cut * 3 // 4
