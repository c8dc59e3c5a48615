"""Steps compiled ahead of time, against closed forms and against a step that runs."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import jax
import pytest
import rich.console

from resnet_jax.config import default_config, resolve
from resnet_jax.data.on_paper import paper_dataset
from resnet_jax.errors import UserError
from resnet_jax.targets import compile as targets
from tests.conftest import REPOSITORY, make_console


def small(**model):
    """An 8-layer net on 8 streamed images of 32 pixels; statistics per image."""
    config = default_config()
    config.model.name = "cifar_resnet8"
    config.data.name = "cifar10"
    config.data.resident = False
    config.training.steps = 10
    config.training.global_batch_size = 8
    config.model.update(model)
    return resolve(config)


STATE = 4 * (2 * 75_290 + 2 * (3 * 16 + 2 * 32 + 2 * 64))  # parameters, velocity, BN
BATCH = 32 * 32 * 3 + 4  # bytes of an image and its label


def compiled(target, devices=None, console=None):
    config = small()
    return targets.compile_step(config, paper_dataset(config), target, devices, console)


def test_a_step_for_cpu_devices():
    console = make_console()
    one, two = compiled("cpu"), compiled("cpu", 2, console)
    assert (one.devices, two.devices) == (1, 2)
    for step, images in ((one, 8), (two, 4)):
        # The mean image, the key and counters are the rest of the state.
        rest = step.argument_bytes - STATE - images * BATCH
        assert 4 * 32 * 32 * 3 <= rest < 8 * 32 * 32 * 3 + 1000
        assert step.alias_bytes == pytest.approx(step.output_bytes, abs=1000)
        assert step.peak_bytes > step.argument_bytes + step.temporary_bytes
    # Three times the forward pass but for the gradient by the images.
    work = 2 * 8 * (3 * 12_238_464 - 442_368)
    assert one.flops == pytest.approx(work, rel=0.15)
    assert one.collectives == ()
    assert sum(kind.nbytes for kind in two.collectives) >= 4 * 75_290
    assert "compiling for 2 x cpu" in console.file.getvalue()


def test_collectives_are_read_from_the_text():
    text = """
  %x = (f32[64]{0:T(128)}, bf16[2,3]{1,0}) all-reduce(%a, %b), channel_id=1
  ROOT %y = f32[] all-reduce(%c), to_apply=%add
  %z = (f32[4]{0}, f32[16]{0}) all-gather-start(%d), channel_id=2
  %w = f32[16]{0} all-gather-done(%z)
  %s = pred[5]{0} collective-permute(%e)
  %t = f32[5]{0} add(%all-reduce, %e)
"""
    found = {kind.name: (kind.count, kind.nbytes) for kind in
             targets.read_collectives(text)}  # fmt: skip
    assert found == {
        "all-reduce": (2, 4 * 64 + 2 * 6 + 4),
        "all-gather": (1, 64),
        "collective-permute": (1, 5),
    }


def test_the_clock_runs_in_a_terminal(capsys):
    console = rich.console.Console(force_terminal=True, width=80)
    with targets._clock(console, "compiling"):
        time.sleep(1.2)
    assert "0:00:01" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "devices", "sentence"),
    [
        ("h300", None, "unknown target 'h300'; valid are cpu, h100, h200 and TPU"),
        ("tpu:v5e", None, "unknown target 'tpu:v5e'; valid are"),
        ("cpu", 99, "99 CPU devices are more than the 8 here: set JAX_NUM_CPU_DEVICES"),
    ],
)
def test_unknown_targets_are_refused(target, devices, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        targets.target_mesh(target, devices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("h200", rf"pip install --no-deps jax-cuda13-plugin=={jax.__version__} "
         rf"jax-cuda13-pjrt=={jax.__version__}"),
        ("tpu:v5e:2x2", "pip install libtpu"),
    ],
)  # fmt: skip
def test_missing_wheels_are_named(monkeypatch, target, command):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=command):
        targets.target_mesh(target)


def installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def compiled_by_the_command(tmp_path, target, *options):
    """What ``plan`` writes: a process that has not looked for devices yet."""
    file = tmp_path / "plan.json"
    config = f"{REPOSITORY}/configs/cifar10.py:cifar_resnet8"
    command = [sys.executable, "-m", "resnet_jax", "plan", "--config", config]
    command += ["--compile", target, "--json", str(file), *options]
    command += ["--config.training.global_batch_size=8", "--config.data.resident=false"]
    environment = {**os.environ, "JAX_OPTIMIZATION_LEVEL": "O1"}
    subprocess.run(command, check=True, cwd=REPOSITORY, env=environment)
    step = json.loads(file.read_text())["compiled"]
    step["collectives"] = {kind["name"]: kind for kind in step["collectives"]}
    return step


@pytest.mark.slow
@pytest.mark.skipif(not installed("libtpu"), reason="libtpu is not installed")
def test_a_step_for_a_tpu_slice(tmp_path):
    step = compiled_by_the_command(tmp_path, "tpu:v5e:2x2")
    assert (step["devices"], step["device_kind"]) == (4, "TPU v5 lite")
    assert step["chip"] == "tpu_v5e"
    assert step["argument_bytes"] > STATE
    assert step["bytes_accessed"] > 2 * STATE
    assert step["flops"] > 0
    assert step["collectives"]["all-reduce"]["nbytes"] >= 4 * 75_290
    with pytest.raises(UserError, match="has 4 devices, not 8"):
        targets.target_mesh("tpu:v5e:2x2", 8)
    with pytest.raises(UserError, match=r"TPU v9.*valid are cpu"):
        targets.target_mesh("tpu:v9:2x2")


@pytest.mark.slow
@pytest.mark.skipif(
    not installed("jax_plugins.xla_cuda13"), reason="jax-cuda13-plugin is not installed"
)
@pytest.mark.parametrize("devices", [1, 8])
def test_a_step_for_gpus(tmp_path, devices):
    step = compiled_by_the_command(tmp_path, "h100", "--devices", str(devices))
    assert step["devices"] == devices
    assert "H100" in step["device_kind"]
    rest = step["argument_bytes"] - STATE - 8 // devices * BATCH
    assert 4 * 32 * 32 * 3 <= rest < 8 * 32 * 32 * 3 + 1000
    # Activations are at least the maps that each normalisation keeps.
    assert step["temporary_bytes"] > 4 * (8 // devices) * 32 * 32 * 16
    total = sum(kind["nbytes"] for kind in step["collectives"].values())
    assert total >= 4 * 75_290 if devices > 1 else total == 0
