"""A run knows the data it was trained on."""

import json
import shutil

import numpy as np
import pytest

import resnet_jax
from resnet_jax.checkpoints import Checkpoints
from resnet_jax.config import resolve
from resnet_jax.errors import UserError
from tests.conftest import make_console, make_tiny_config

NAMES = [f"kind{label}" for label in range(10)]


def write_cifar(folder, names, train=20, test=30):
    """Images whose brightness shows their class; ``names`` gives the labels' order."""
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("\n".join(names))
    counts = {f"data_batch_{i}.bin": train for i in range(1, 6)}
    for file, count in (counts | {"test_batch.bin": test}).items():
        kinds = np.arange(count) % 10
        labels = [names.index(f"kind{kind}") for kind in kinds]
        pixels = np.repeat(25 * kinds[:, None], 3072, axis=1)
        rows = np.concatenate([np.array(labels)[:, None], pixels], axis=1)
        rows.astype(np.uint8).tofile(folder / file)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A config, its workdir with a run stopped at step 2 of 4, and its data."""
    root = tmp_path_factory.mktemp("data")
    config = make_tiny_config("unused")
    config.data.update({"name": "cifar10", "path": str(root / "cifar")})
    config.training.steps = config.evaluation.every_steps = 4
    config.checkpoint.every_steps = 2
    write_cifar(root / "cifar", NAMES)
    resnet_jax.train(config, root / "run", make_console())
    (root / "run" / "result.json").unlink()
    shutil.rmtree(root / "run" / "checkpoints" / "4")
    return config, root / "run", root / "cifar"


CHANGES = {
    "the class 'kind0' is missing and 'other' is new": (["other", *NAMES[1:]], 20, 30),
    "class 0 is 'kind9', not 'kind0'": (NAMES[::-1], 20, 30),
    "the train split has 105 examples, not 100": (NAMES, 21, 30),
    "the test split has 40 examples, not 30": (NAMES, 20, 40),
}


@pytest.mark.parametrize("difference", CHANGES)
def test_other_data_in_the_place_of_the_runs_are_refused(run, difference, console):
    config, workdir, data = run
    kept = data.rename(data.with_name("kept"))
    names, train, test = CHANGES[difference]
    try:
        write_cifar(data, NAMES, train, test)
        (data / "batches.meta.txt").write_text("\n".join(names))
        before = (workdir / "config.json").read_text()
        with pytest.raises(UserError, match=f"on other data: {difference}"):
            resnet_jax.train(config, workdir, console)
        assert (workdir / "config.json").read_text() == before
        if sorted(names) == NAMES and names != NAMES:
            return  # evaluated by name
        with pytest.raises(UserError, match=f"on other data: {difference}"):
            resnet_jax.evaluate(workdir, console=console)
    finally:
        shutil.rmtree(data)
        kept.rename(data)


def test_a_checkpoint_knows_the_data_too(run, tmp_path, console):
    """config.json may be of another start, or copied from another run."""
    config, workdir, _ = run
    shutil.copytree(workdir, tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["class_names"] == NAMES
    saved["data"]["counts"]["train"] = 105
    other = config.copy_and_resolve_references()
    other.data.path = str(write_cifar(tmp_path / "cifar", NAMES, train=21))
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="has 105 examples, not 100"):
        resnet_jax.train(other, tmp_path / "run", console)


def test_a_net_is_evaluated_where_its_data_moved_and_by_class_name(
    run, tmp_path, console, monkeypatch
):
    _, workdir, data = run
    expected = resnet_jax.evaluate(workdir, console=console)
    del expected["mistakes"]  # which name files
    shuffled = write_cifar(tmp_path / "other", NAMES[::-1])
    monkeypatch.chdir(tmp_path)
    for path in (str(data), str(shuffled), "other"):
        moved = {"data.path": path}
        found = resnet_jax.evaluate(workdir, overrides=moved, console=console)
        del found["mistakes"]
        assert found == expected
    more = write_cifar(tmp_path / "more", NAMES, test=40)
    moved = {"data.path": str(more)}
    found = resnet_jax.evaluate(workdir, overrides=moved, console=console)
    assert found["count"] == 40
    write_cifar(tmp_path / "renamed", NAMES)
    (tmp_path / "renamed" / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    with pytest.raises(UserError, match=r"'kind0' is missing.*of the run's classes"):
        resnet_jax.evaluate(workdir, overrides={"data.path": "renamed"})
    with pytest.raises(UserError, match=r"model\.name cannot be changed"):
        resnet_jax.evaluate(workdir, overrides={"model.name": "cifar_resnet14"})


def test_a_checkpoint_that_training_replaces_while_it_is_read_is_no_fault(
    run, tmp_path, console, monkeypatch
):
    _, workdir, _ = run
    shutil.copytree(workdir, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "2").rename(folder / "3")
    read = Checkpoints.shapes

    def shapes(checkpoints, step):
        if step == 3:
            (folder / "3").rename(folder / "4")
        return read(checkpoints, step)

    monkeypatch.setattr(Checkpoints, "shapes", shapes)
    assert resnet_jax.evaluate(tmp_path / "run", console=console)["step"] == 4


def test_a_relative_path_is_kept_absolute(tmp_path, monkeypatch):
    config = resnet_jax.default_config()
    config.training.steps = 1
    monkeypatch.chdir(tmp_path)
    for given, kept in {
        "here": tmp_path / "here",
        "gs://bucket/there": "gs://bucket/there",
        "~": tmp_path.home(),
    }.items():
        config.data.path = given
        assert resolve(config).data.path == str(kept)
