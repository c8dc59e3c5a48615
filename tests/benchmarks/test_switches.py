"""Our step with its switches, as a trial."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import switches
from resnet_jax.errors import UserError

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_trial_measures_every_form(tmp_path):
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.switches", "--json", str(file)]
    command += ["--model", "cifar_resnet8", "--batch", "4"]
    command += ["--rounds", "1", "--steps", "1"]
    command += ["--compare", "fused norm=fused_norm:true,norm_variance:fast"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "fused norm" in done.stdout
    result = json.loads(file.read_text())
    assert result["switches"] == {
        "fused norm": {"fused_norm": True, "norm_variance": "fast"}
    }
    rows = result["contenders"]
    assert [row["name"] for row in rows] == ["resnet_jax", "fused norm"]
    for row in rows:
        assert row["status"] == "measured"
        assert row["parameters"] == 75_290
    assert rows[0]["time_ratio"] == 1


def test_an_unknown_option_is_refused():
    command = ["--model", "cifar_resnet8", "--batch", "4", "--compare", "a=no_such:1"]
    with pytest.raises(UserError, match=r"^there is no option no_such; "):
        switches.main(command)
