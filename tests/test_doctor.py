"""The facts of a machine, real ones and faults, and the hints that follow."""

import copy
import json
import re
import time
import tomllib

import pytest

from resnet_jax import device_check, doctor
from resnet_jax.cli import main
from tests.conftest import REPOSITORY

GPU = {"platform": "gpu", "kind": "NVIDIA H100", "memory_bytes": 60 * 2**30}
RUNS = {"fault": None, "seconds": 0.1}
HEALTHY = {
    "resnet_jax": "0.1.0",
    "commit": None,
    "python": "3.12.0",
    "executable": "/venv/bin/python",
    "versions": {"jax": "0.11.0", "jaxlib": "0.11.0", "flax": "0.12.0"},
    "extras": dict.fromkeys(doctor.EXTRAS) | {"cuda13": "0.11.0"},
    "nvidia": {"gpus": ["NVIDIA H100, 79 GiB"] * 2, "driver": "580.65.06"},
    "tpu": False,
    "settings": {},
    "devices": {"backend": "gpu", "fault": None, "devices": [GPU | RUNS, GPU | RUNS]},
    "caches": {
        "huggingface": {"path": "/hub", "bytes": 3 * 2**30},
        "tfds": {"path": "/tfds", "bytes": None, "data_sets": ["digits"]},
    },
    "machine": {
        "system": "Linux x86_64",
        "cores": 16,
        "memory_bytes": 64 * 2**30,
        "folder": "/home",
        "disk_free_bytes": 100 * 2**30,
    },
    "jpeg": "windows",
}
CPU = {"platform": "cpu", "kind": "cpu", "memory_bytes": None}
ON_CPU = {"devices.backend": "cpu", "devices.devices": [CPU | RUNS]}
NO_GPU = ON_CPU | {"nvidia.gpus": [], "nvidia.driver": None, "extras.cuda13": None}
NOTHING = {"devices.backend": None, "devices.devices": []}


def facts_with(changes):
    facts = copy.deepcopy(HEALTHY)
    for name, value in changes.items():
        place, _, key = name.rpartition(".")
        (facts[place] if place else facts)[key] = value
    return facts


@pytest.mark.parametrize("changes", [{}, NO_GPU, {"extras.torch": "2.9"}])
def test_a_healthy_machine_needs_no_hint(changes):
    assert doctor.find_hints(facts_with(changes)) == []


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        (ON_CPU | {"extras.cuda13": None}, r"GPU \(NVIDIA H100.*\), .*pip .*cuda13"),
        (
            ON_CPU | {"extras.cuda13": None, "nvidia.driver": "550.54"},
            r"does not use it: install its plugin with pip install .*cuda12\]",
        ),
        (
            ON_CPU | {"nvidia.gpus": [], "extras.cuda13": None},
            r"GPU \(driver 580\.65\.06\), but jax does not use it",
        ),
        (ON_CPU | {"settings.JAX_PLATFORMS": "cpu"}, "JAX_PLATFORMS=cpu: unset it"),
        (ON_CPU | {"settings.CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES hid"),
        (ON_CPU, "although a plugin is installed: look at"),
        (
            {"extras.cuda13": "0.10.1"},
            r"cuda13-plugin 0\.10\.1 .* jaxlib 0\.11\.0: rep",
        ),
        ({"extras.cuda12": "0.11.0"}, "CUDA 12 and of CUDA 13 are both installed"),
        ({"versions.jaxlib": None}, "jaxlib is not installed"),
        (NO_GPU | {"extras.tpu": "0.0.40"}, "libtpu is installed and there is no TPU"),
        (NO_GPU | {"tpu": True}, "has TPUs, .* install libtpu with pip .*tpu"),
        (NO_GPU | {"tpu": True, "extras.tpu": "1"}, "has TPUs.* may hold them"),
        (
            NO_GPU | {"tpu": True, "extras.tpu": "1", "settings.JAX_PLATFORMS": "cpu"},
            "has TPUs.* because JAX_PLATFORMS=cpu: unset it",
        ),
        (NOTHING | {"devices.fault": "no answer within 9 s"}, "no devices .no answer"),
        (
            NO_GPU
            | NOTHING
            | {
                "devices.fault": 'Invalid value "abc" for JAX flag jax_num_cpu_devices',
                "settings.JAX_NUM_CPU_DEVICES": "abc",
                "settings.JAX_PLATFORMS": "cpu",
            },
            "does not start .*: unset JAX_NUM_CPU_DEVICES, or correct it",
        ),
        (
            NOTHING | {"devices.fault": "x", "settings.JAX_PLATFORMS": "cuda"},
            "JAX_PLATFORMS=cuda chooses them: unset it",
        ),
        (
            {
                "devices.devices": [
                    GPU | RUNS,
                    GPU | {"fault": "a convolution is wrong"},
                ]
            },
            r"device 1 \(NVIDIA H100\) does not run .*\(a convolution is wrong\): end",
        ),
        (
            {"devices.devices": [GPU | RUNS, GPU], "devices.fault": "no answer"},
            r"device 1 .*\(no answer\)",
        ),
        (
            {"settings.LD_LIBRARY_PATH": "/usr/local/cuda/lib64"},
            "LD_LIBRARY_PATH names",
        ),
        ({"settings.JAX_DISABLE_JIT": "1"}, "JAX_DISABLE_JIT=1 makes .* slower"),
        (
            NO_GPU | {"devices.devices": [CPU | RUNS] * 8},
            "8 devices are simulated on this CPU",
        ),
        ({"machine.disk_free_bytes": 2**30}, "the disk of /home has 1 GiB left"),
        ({"machine.memory_bytes": 2**31}, "2 GiB of memory are few: lower"),
        ({"jpeg": "whole images"}, "JPEG files are decoded whole.*pip install turboj"),
    ],
)
def test_a_fault_gives_one_hint_that_says_what_to_do(changes, hint):
    (found,) = doctor.find_hints(facts_with(changes))
    assert re.search(hint, found), found
    assert ": " in found


def test_a_platform_without_its_plugin_gives_the_plugin_too():
    missing = {"devices.fault": "x", "settings.JAX_PLATFORMS": "cuda"}
    facts = facts_with(NOTHING | missing | {"extras.cuda13": None})
    _, hint = doctor.find_hints(facts)
    assert re.search(r"NVIDIA H100.* install its plugin with .*cuda13", hint)


def test_the_output_fits_a_screen(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gather_facts", lambda _: facts_with({}))
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert len(output.splitlines()) <= 24
    assert "2 x NVIDIA H100, 60 GiB for jax, convolution runs" in output
    assert "2 x NVIDIA H100, 79 GiB, driver 580.65.06" in output
    assert "/hub, 3 GiB" in output
    assert output.rstrip().endswith("Nothing to improve.")


@pytest.mark.parametrize(
    ("changes", "status"), [(ON_CPU, 0), (NOTHING | {"devices.fault": "broken"}, 1)]
)
def test_only_a_jax_that_cannot_run_fails_the_command(
    changes, status, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(doctor, "gather_facts", lambda _: facts_with(changes))
    file = tmp_path / "facts.json"
    assert main(["doctor", "--json", str(file)]) == status
    printed = capsys.readouterr()
    assert ("jax runs on no device here" in printed.err) == bool(status)
    (hint,) = json.loads(file.read_text())["hints"]
    assert f"- {hint}" in printed.out


def test_the_facts_of_this_machine(tmp_path, monkeypatch):
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    prepared = tmp_path / "digits" / "1.0.0" / "dataset_info.json"
    prepared.parent.mkdir(parents=True)
    prepared.write_bytes(bytes(100))
    settings = {"TFDS_DATA_DIR": tmp_path, "JAX_PLATFORMS": "cpu"}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    facts = json.loads(json.dumps(doctor.gather_facts()))
    assert facts["devices"]["fault"] is None
    (device,) = facts["devices"]["devices"]
    assert (device["platform"], device["fault"]) == ("cpu", None)
    assert facts["settings"]["JAX_PLATFORMS"] == "cpu"
    assert facts["caches"]["tfds"] == {
        "path": str(tmp_path),
        "bytes": 100,
        "data_sets": ["digits"],
    }
    assert set(facts) == set(HEALTHY)
    assert doctor.describe_facts(facts)["tfds"].endswith("prepared: digits")


@pytest.mark.parametrize(
    ("program", "fault", "devices"),
    [
        ("import time; time.sleep(60)", "no answer within 2 s", []),
        ("import os; os.abort()", "exit status -6", []),
        ("raise RuntimeError('jaxlib is\\ttoo old')", "RuntimeError: jaxlib is", []),
        (
            "import time\n"
            'print(\'{"backend": "gpu", "devices": [{}, {}]}\')\n'
            'print(\'{"device": 0, "fault": null, "seconds": 1}\')\n'
            "print('{\"device\": 1, ', end='', flush=True); time.sleep(60)",
            "no answer within 2 s",
            [RUNS | {"seconds": 1}, {}],
        ),
    ],
)
def test_devices_that_hang_or_crash_are_reported(
    program, fault, devices, tmp_path, monkeypatch
):
    (tmp_path / "check.py").write_text(program)
    monkeypatch.setattr(device_check, "__file__", str(tmp_path / "check.py"))
    began = time.monotonic()
    found = doctor.try_devices(2)
    assert time.monotonic() - began < 10
    assert found["fault"].startswith(fault)
    assert found["devices"] == devices


def test_a_wrong_convolution_is_seen(capsys, monkeypatch):
    import jax

    monkeypatch.setattr(jax.lax, "conv_general_dilated", lambda x, *_, **__: x[..., :4])
    device_check.check_devices()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 1 + len(lines[0]["devices"])
    assert {line["fault"] for line in lines[1:]} == {"a convolution is wrong by 71"}


def test_every_extra_is_looked_for():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].keys()
    assert extras - {"test", "docs"} - doctor.EXTRAS.keys() == set()
    assert doctor.EXTRAS.keys() <= extras
