import json

from resnet_jax.cli import main
from tests.conftest import REPOSITORY

CONFIG = str(REPOSITORY / "configs/cifar10.py:cifar_resnet8")


def test_the_table_and_the_file(tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = ["plan", "--config", CONFIG, "--devices", "4", "--hosts", "2"]
    arguments += ["--chip", "tpu_v5e", "a100_80gb", "--rate", "2000"]
    arguments += ["--config.data.resident=false", "--images-per-core=500"]
    arguments += ["--config.training.global_batch_size=8", "--compile", "cpu"]
    assert main([*arguments, "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "cifar_resnet8, float32, cifar10; 4 devices on 2 hosts" in lines
    words = [line.split() for line in lines]
    assert ["step", "32,001", "0.01", "after", "a", "drop"] in words
    assert ["images/s", "2,000;", "1,000", "per", "host"] in words
    assert [line[:4] for line in words if line[:1] == ["cores"]] == [
        ["cores", "per", "host", "2.0,"]
    ]
    assert any(line.startswith("tpu_v5e ") for line in lines)
    content = json.loads(file.read_text())
    assert content["images_per_device"] == 2
    assert [chip["name"] for chip in content["chips"]] == ["tpu_v5e", "a100_80gb"]
    peak = content["compiled"]["peak_bytes"]
    assert ["peak", f"{peak / 1e6:,.2f}", "MB"] in words


def test_mistakes_leave_no_traceback(capsys):
    assert main(["plan", "--config", CONFIG, "--devices", "256"]) == 1
    error = capsys.readouterr().err
    assert error == (
        "resnet-jax: error: --config.training.global_batch_size=128 does not divide "
        "over 256 devices; the nearest that does is 256\n"
    )
