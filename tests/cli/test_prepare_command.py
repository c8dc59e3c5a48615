import json

import pytest

from resnet_jax.cli import main
from tests.conftest import write_image_folder


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "images", {"train": 3, "val": 1})


def test_prepares_and_verifies(folder, tmp_path, capsys):
    output = str(tmp_path / "out")
    assert main(["prepare", str(folder), "--splits", "train,val", output]) == 0
    printed = capsys.readouterr().out
    assert "train: 9 examples in 1 shards" in printed
    assert f"data.path={output}" in printed
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(manifest["splits"]) == ["train", "val"]
    assert main(["prepare", "--verify", output]) == 0
    assert "all 2 shards are whole, 12 examples" in capsys.readouterr().out
    (shard,) = (tmp_path / "out").glob("val-*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert main(["prepare", output, "--verify"]) == 1
    assert f"{shard.name} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["one"], "takes SOURCE and OUTPUT, or --verify and OUTPUT alone; given one"),
        (["a", "b", "--verify"], "takes SOURCE and OUTPUT"),
        ([], "given nothing"),
        (["nowhere", "out"], "source nowhere does not exist"),
    ],
)
def test_faults_are_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *arguments]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
