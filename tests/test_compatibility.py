"""Files of an earlier version: its weights load, and its runs go on.

``fixtures/README.md`` says how the files were made.
"""

import json
import tarfile
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

import resnet_jax
from resnet_jax.cli import main

FIXTURES = Path(__file__).parent / "fixtures"
WEIGHTS = FIXTURES / "weights.safetensors"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())


@pytest.fixture(scope="module")
def model():
    return resnet_jax.create_model("cifar_resnet8", num_classes=10)


def flat(variables):
    return traverse_util.flatten_dict(variables, sep="/")


def test_weights_load_bit_for_bit(model):
    arrays = flat(resnet_jax.load_weights(WEIGHTS, model))
    checksum = 0
    for name in sorted(arrays):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(np.asarray(arrays[name]).tobytes(), checksum)
    assert checksum == EXPECTED["crc32"]


def test_weights_give_the_same_logits(model):
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    variables = resnet_jax.load_weights(WEIGHTS, model)
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    np.testing.assert_allclose(logits, EXPECTED["logits"], rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_from_its_checkpoint(model, tmp_path, tfds_dir, console):
    """Eight more steps end where the earlier version ended.

    Not bit for bit: other versions of jax, numbers of devices and CPUs round in other
    ways. One device or eight, with or without XLA's optimisation, differ by 3e-7 in a
    weight here, while the eight steps change weights by more than 1e-2.
    """
    with tarfile.open(FIXTURES / "half_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    workdir = tmp_path / "run"
    saved = json.loads((workdir / "config.json").read_text())["config"]
    config = resnet_jax.default_config()
    for section, values in saved.items():
        if isinstance(values, dict):
            for name, value in values.items():
                if name in config[section]:
                    config[section][name] = value
    config.data.data_dir = tfds_dir
    resnet_jax.train(config, workdir, console)

    assert "checkpoint at step 8" in console.file.getvalue()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == len(EXPECTED["rows"])
    measured = {"images_per_second", "input_wait", "seconds"}
    for row, expected in zip(rows, EXPECTED["rows"]):
        assert row.keys() == expected.keys()
        for name in expected.keys() - measured:
            assert row[name] == pytest.approx(expected[name], rel=1e-5), name
    # The rows up to the checkpoint come from it, their clock included.
    assert rows[:2] == EXPECTED["rows"][:2]

    target = tmp_path / "end.safetensors"
    assert main(["convert", str(workdir), str(target)]) == 0
    found = flat(resnet_jax.load_weights(target, model))
    expected = flat(resnet_jax.load_weights(WEIGHTS, model))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=3e-6, err_msg=name)
