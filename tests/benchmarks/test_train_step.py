"""The peers are the nets they are said to be, and the script runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import contest, peers
from resnet_jax.analysis.complexity import (
    abstract_variables,
    count_multiply_adds,
    count_parameters,
)
from resnet_jax.models import catalog_entry

REPOSITORY = Path(__file__).parents[2]

# torchvision's published counts, and for the CIFAR nets those of their definition.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "cifar_resnet8": 78_042,
    "cifar_resnet20": 272_474,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_flax_peer_has_the_published_parameters(name):
    layout = peers.LAYOUTS[name]
    shape = (layout.image_size, layout.image_size, 3)
    variables = abstract_variables(peers.FlaxResNet(layout), shape)
    assert count_parameters(variables["params"]) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_flax_peer_does_our_net_s_work(name):
    net = peers.FlaxResNet(peers.LAYOUTS[name])
    assert count_multiply_adds(net, (224, 224, 3)) == catalog_entry(name).multiply_adds


@pytest.mark.parametrize("name", PARAMETERS)
def test_torch_peer_has_the_same_parameters(name):
    torch = pytest.importorskip("torch")
    from benchmarks.peers_torch import TorchResNet

    with torch.device("meta"):
        net = TorchResNet(peers.LAYOUTS[name])
    assert sum(weight.numel() for weight in net.parameters()) == PARAMETERS[name]


def test_ratios_are_medians_of_the_rounds_ratios():
    def contender(name):
        return contest.Contender(name, 1, 1, lambda steps: None, lambda: True)

    rows = contest.summarize(
        [contender("resnet_jax"), contender("other")],
        # The machine slows down tenfold: the medians' ratio would be 20.
        {"resnet_jax": [1.0, 1.0, 10.0], "other": [2.0, 20.0, 20.0]},
        batch_size=8,
    )
    assert [row["time_ratio"] for row in rows] == [1.0, 2.0]
    assert rows[0]["images_per_second"] == 8000.0


@pytest.mark.slow
def test_script_writes_every_contender(tmp_path):
    # A process of its own: the comparison is made on one device.
    file = tmp_path / "results" / "step.json"
    command = "-m benchmarks.train_step --model cifar_resnet8 --batch 4"
    command += f" --rounds 1 --steps 1 --json {file}"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["command"].startswith("python -m benchmarks.train_step --model")
    assert {"jax", "cpu", "torch_threads", "commit"} <= result["environment"].keys()
    rows = {row["name"]: row for row in result["contenders"]}
    assert list(rows) == ["resnet_jax", "flax_example", "torch", "torch_channels_last"]
    for name, row in rows.items():
        assert name in done.stdout
        if row["status"] == "not installed":
            assert name.startswith("torch")
            continue
        assert row["status"] == "measured"
        assert row["parameters"] == (75_290 if name == "resnet_jax" else 78_042)
        assert row["images_per_second"] > 0
        assert len(row["milliseconds_of_rounds"]) == 1
