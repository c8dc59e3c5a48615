import json

import pytest

from resnet_jax.cli import main
from tests.conftest import REPOSITORY

CONFIG = str(REPOSITORY / "configs/cifar10.py:cifar_resnet8")


def test_the_table_and_the_file(tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = ["plan", "--config", CONFIG, "--devices", "4", "--hosts", "2"]
    arguments += ["--chip", "tpu_v5e", "a100_80gb", "--image-bytes", "3073"]
    arguments += ["--config.data.resident=false", "--efficiency=0.5"]
    assert main([*arguments, "--json", str(file)]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "cifar_resnet8, float32, cifar10; 4 devices on 2 hosts"
    assert "time: roofline, not measured; at 50% of the peaks" in lines
    assert [line.split() for line in lines if line.startswith("  step 32,001")] == [
        ["step", "32,001", "0.01", "after", "a", "drop"]
    ]
    assert len([line for line in lines if line.startswith("tpu_v5e ")]) == 2
    content = json.loads(file.read_text())
    assert content["images_per_device"] == 32
    assert [chip["name"] for chip in content["chips"]] == ["tpu_v5e", "a100_80gb"]
    assert content["chips"][0]["host_bytes_per_second"] == pytest.approx(
        3073 * content["chips"][0]["host_images_per_second"]
    )


def test_mistakes_leave_no_traceback(capsys):
    assert main(["plan", "--config", CONFIG, "--devices", "256"]) == 1
    error = capsys.readouterr().err
    assert error == (
        "resnet-jax: error: training.global_batch_size=128 does not divide over 256 "
        "devices; the nearest that does is 256\n"
    )
    assert main(["plan", "--config", CONFIG, "--json", "/nowhere/a.json"]) == 1
    assert "cannot be written" in capsys.readouterr().err
