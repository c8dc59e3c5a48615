"""The script runs as a trial, and says of each case what became of it."""

import json

import pytest

from benchmarks import gpu_small_images
from benchmarks.gpu_small_images import Case


def test_the_plan_begins_with_what_matters_and_names_known_things():
    plan = gpu_small_images.cases(tiny=False)
    assert (plan[0].framework, plan[0].depth, plan[0].seeds) == ("jax", 20, 1)
    for case in plan:
        assert case.flags in gpu_small_images.FLAGS
        assert case.precision in gpu_small_images.PRECISIONS


def test_a_case_that_fails_or_takes_too_long_says_so():
    failing = Case("jax", 7, "float32", calls=(1, 2))  # there is no such depth
    rows = gpu_small_images.measure(failing, tiny=True, seconds=300)
    assert all("cifar_resnet7" in row["status"] for row in rows)
    (row,) = gpu_small_images.measure(
        Case("jax", 8, "float32", calls=(1,)), tiny=True, seconds=0.1
    )
    assert row["status"] == "not measured: out of time"


@pytest.mark.slow
def test_a_trial_measures_every_case_that_it_can(tmp_path):
    gpu_small_images.main(["--tiny", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu_small_images.json").read_text())
    rows = result["rows"]
    assert [(row["framework"], row["call"], row["seeds"]) for row in rows] == [
        ("jax", 1, 1),
        ("jax", 2, 1),
        ("torch", "eager", 1),
    ]
    for row in rows:
        if row["framework"] == "torch" and "torch" in row["status"]:
            assert "No module named 'torch'" in row["status"]
            continue
        assert row["status"] == "measured", row
        assert row["images_per_second"] > 0
        assert row["parameters"] == {"jax": 75_290, "torch": 78_042}[row["framework"]]
