"""Seeds side by side: the same steps both ways, and the script runs."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import seeds
from resnet_jax.training.benchmark import synthetic_step

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_vmapped_step_is_each_seeds_own_step():
    train_step, state, batch = synthetic_step("cifar_resnet8", 8, 8, "float32")
    states = seeds.stacked(state, 2)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), batch)
    found = jax.jit(jax.vmap(train_step, in_axes=(0, None, 0)))(states, None, batches)
    for seed in range(2):
        expected = train_step(seeds.alone(state, seed), None, batch)
        for a, b in zip(
            jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True
        ):
            np.testing.assert_allclose(a[seed], b, atol=1e-5)
    # Their augmentation differs, and so do their losses.
    assert found.sums.loss[0] != found.sums.loss[1]


@pytest.mark.slow
def test_script_writes_every_form_and_number_of_seeds(tmp_path):
    file = tmp_path / "seeds.json"
    command = "-m benchmarks.seeds --model cifar_resnet8 --batch 2 --size 8 --rounds 1 "
    command += f"--steps 1 --seeds 1 2 --algorithms products --json {file}"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["conv_algorithm"], row["seeds"]) for row in rows] == [
        ("products", 1),
        ("products", 2),
    ]
    for row in rows:
        assert row["speedup_of_vmap"] > 0
        assert f"{row['milliseconds_vmap']:.2f}" in done.stdout
