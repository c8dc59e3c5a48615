"""Speed of inference: what is timed, and its figures."""

import json

import jax
import numpy as np
import pytest

from resnet_jax.cli import main
from resnet_jax.errors import UserError
from resnet_jax.evaluation.nets import PREPROCESSING
from resnet_jax.models import create_model
from resnet_jax.training import benchmark
from resnet_jax.weights import save_weights


def test_figures_are_those_of_the_calls(monkeypatch):
    """A clock on which compiling takes 5 s, and call i, from 1 on, i milliseconds."""
    ticks = [0.0, 5.0]
    for call in range(1, 24):
        ticks += [ticks[-1], ticks[-1] + call / 1000]
    clock = iter(ticks)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    double = jax.jit(lambda factor, images: factor * images)
    row = benchmark._time_calls(double, np.uint8(2), (7, 2, 2, 3), steps=20)
    timed = range(4, 24)  # three calls come before
    assert row["compile_seconds"] == pytest.approx(5)
    assert row["images_per_second"] == pytest.approx(7 / (np.median(timed) / 1000))
    for percent in (50, 90, 99):
        expected = np.percentile(timed, percent)
        assert row[f"milliseconds_p{percent}"] == pytest.approx(expected)


@pytest.mark.parametrize("source", ["the catalog", "a file"])
def test_the_command_prints_and_writes_each_batch_size(source, tmp_path, capsys):
    file, weights = tmp_path / "inference.json", tmp_path / "w.safetensors"
    flags = ["--model", "cifar_resnet8"]
    if source == "a file":
        model = create_model("cifar_resnet8", num_classes=4)
        variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), "float32"))
        facts = {"mean": [0.5] * 3, "std": [0.5] * 3, "protocol": {"kind": "stored"}}
        metadata = {PREPROCESSING: json.dumps(facts)}
        save_weights(weights, variables, model, name=flags[1], metadata=metadata)
        flags = ["--weights", str(weights)]
    counts = ["--batch", "1", "3", "--steps", "2", "--json", str(file)]
    assert main(["benchmark", "inference", *flags, *counts]) == 0
    printed = capsys.readouterr().out
    assert "images/s" in printed
    result = json.loads(file.read_text())
    assert [row["batch_size"] for row in result["batches"]] == [1, 3]
    assert (result["model"], result["folded"]) == ("cifar_resnet8", True)
    assert result["environment"]["cpu_cores"] > 0


def test_a_net_that_cannot_be_folded_is_timed_in_the_dtype(capsys):
    result = benchmark.benchmark_inference(
        "cifar_preact_resnet8", batch_sizes=[1], steps=1, dtype="bfloat16"
    )
    assert (result["folded"], result["dtype"]) == (False, "bfloat16")


def test_wrong_use_is_refused(capsys):
    assert main(["benchmark", "inference"]) == 1
    assert "give --model NAME" in capsys.readouterr().err
    with pytest.raises(UserError, match="at least 1"):
        benchmark.benchmark_inference("cifar_resnet8", batch_sizes=[8, 0])
