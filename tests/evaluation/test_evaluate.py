"""evaluate and evaluate_nets: files, runs, seeds, ensembles, other label sets."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import resnet_jax
from resnet_jax.cli import main
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluate import evaluate_nets
from resnet_jax.models import create_model
from tests.conftest import make_console, make_tiny_config, write_image_folder
from tests.models.reference import random_variables

NAME, SIZE = "cifar_resnet8", 10
PROTOCOL = "center:size=10,shorter_side=10"
ORDER = ("cat", "ant", "bee")
GREY = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def save_net(path, seed, classes=("ant", "bee", "cat")):
    """A net whose file names its classes."""
    model = create_model(NAME, num_classes=len(classes))
    variables = random_variables(model, np.zeros((1, SIZE, SIZE, 3), np.float32), seed)
    write_net(path, model, variables, classes)
    return str(path), model, variables


def write_net(path, model, variables, classes):
    content = {**GREY, "protocol": {"kind": "stored"}, "class_names": classes}
    metadata = {"preprocessing": json.dumps(content)}
    resnet_jax.save_weights(path, variables, model, name=NAME, metadata=metadata)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """Two nets, a folder of images, and their logits by Flax alone."""
    root = tmp_path_factory.mktemp("problem")
    write_image_folder(root / "images", per_class={"test": 5}, shape=(SIZE, SIZE))
    files = sorted((root / "images" / "test").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]) / 255.0
    names, logits = [], []
    for seed in (0, 1):
        name, model, variables = save_net(root / f"net{seed}.safetensors", seed)
        names.append(name)
        images = ((pixels - 0.5) / 0.25).astype(np.float32)
        logits.append(np.asarray(model.apply(variables, images), np.float64))
    return names, str(root / "images"), np.stack(logits), np.repeat([0, 1, 2], 5)


def softmax(logits):
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def test_a_file_on_a_folder(problem, console):
    names, data, logits, labels = problem
    found = resnet_jax.evaluate(names[0], data=data, batch_size=4, console=console)
    wrong = logits[0].argmax(-1) != labels
    assert (found["errors"], found["count"]) == (wrong.sum(), 15)
    expected = -np.log(softmax(logits[0])[np.arange(15), labels]).mean()
    assert found["loss"] == pytest.approx(expected, rel=1e-4)
    assert f"test error {100 * wrong.mean():.2f} %" in console.file.getvalue()


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_two_nets_and_their_ensemble(problem, console, average):
    names, data, logits, labels = problem
    found = evaluate_nets(names, data=data, ensemble=average, console=console)
    combined = logits.mean(0) if average == "logits" else softmax(logits).mean(0)
    wrong = combined.argmax(-1) != labels
    assert found["ensemble"]["errors"] == wrong.sum()
    probabilities = softmax(combined) if average == "logits" else combined
    loss = -np.log(probabilities[np.arange(15), labels]).mean()
    assert found["ensemble"]["loss"] == pytest.approx(loss, rel=1e-4)
    errors = (logits.argmax(-1) != labels).sum(-1)
    assert [net["errors"] for net in found["nets"]] == errors.tolist()
    assert found["difference"]["difference"] == pytest.approx(
        (errors[0] - errors[1]) / 15
    )
    assert "spread" not in found
    json.dumps(found)


def test_a_net_with_its_classes_in_another_order(problem, tmp_path, console):
    names, data, *_ = problem
    turned, model, variables = save_net(tmp_path / "t.safetensors", 0, ORDER)
    head = variables["params"]["head"]
    variables["params"]["head"] = {leaf: head[leaf][..., [2, 0, 1]] for leaf in head}
    write_net(turned, model, variables, ORDER)
    nets = [names[0], turned]
    found = evaluate_nets(nets, data=data, ensemble="logits", console=console)
    expected = found["nets"][0]
    for same in (found["nets"][1], found["ensemble"]):
        assert same["errors"] == expected["errors"]
        assert same["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_folder_of_some_classes(problem, tmp_path, console):
    names, data, logits, labels = problem
    folder = tmp_path / "my pictures"  # no name of a split
    for kind in ("ant", "cat"):
        shutil.copytree(Path(data) / "test" / kind, folder / kind)
    kept = labels != 1
    cut = resnet_jax.evaluate(names[0], data=str(folder), console=console)
    two = logits[0][kept][:, [0, 2]].argmax(-1) * 2
    assert cut["errors"] == (two != labels[kept]).sum()
    assert "2 of the net's 3 classes" in console.file.getvalue()
    whole = resnet_jax.evaluate(
        names[0], data=str(folder), all_classes=True, console=console
    )
    assert whole["errors"] == (logits[0][kept].argmax(-1) != labels[kept]).sum()


def test_several_right_labels_or_none(tmp_path, console):
    names = [str(label) for label in range(3)]
    net, model, variables = save_net(tmp_path / "net.safetensors", 0, names)
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "val" / "0").mkdir(parents=True)
    pixels = rng.integers(0, 255, (4, SIZE, SIZE, 3), np.uint8)
    for number, image in enumerate(pixels, 1):
        name = f"ILSVRC2012_val_{number:08d}.png"
        Image.fromarray(image).save(tmp_path / "data" / "val" / "0" / name)
    images = ((pixels / 255.0 - 0.5) / 0.25).astype(np.float32)
    best = np.asarray(model.apply(variables, images)).argmax(-1)
    sets = [[int(best[0]), 0], [], [int((best[2] + 1) % 3)], [0, 1, 2]]
    (tmp_path / "real.json").write_text(json.dumps(sets))
    found = resnet_jax.evaluate(
        net,
        data=str(tmp_path / "data"),
        labels=tmp_path / "real.json",
        console=console,
    )
    assert (found["errors"], found["count"]) == (1, 3)


def test_grey_and_colour_nets_on_images_as_stored(problem, tmp_path, console):
    names, data, *_ = problem
    model = create_model(NAME, num_classes=3)
    variables = random_variables(model, np.zeros((1, SIZE, SIZE, 1), np.float32))
    content = {"mean": [0.5], "std": [0.25], "protocol": {"kind": "stored"}}
    grey = tmp_path / "grey.safetensors"
    metadata = {"preprocessing": json.dumps(content)}
    resnet_jax.save_weights(grey, variables, model, name=NAME, metadata=metadata)
    both = evaluate_nets([names[0], grey], data=data, console=console)
    for net, together in zip([names[0], grey], both["nets"], strict=True):
        alone = resnet_jax.evaluate(net, data=data, console=console)
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)


@pytest.mark.parametrize("split", [None, "test"])
def test_a_folder_of_class_folders_by_its_name(problem, monkeypatch, console, split):
    names, data, *_ = problem
    expected = resnet_jax.evaluate(names[0], data=data, console=console)
    monkeypatch.chdir(Path(data) / "test")
    found = resnet_jax.evaluate(names[0], data=".", split=split, console=console)
    assert (found["loss"], found["count"]) == (expected["loss"], 15)


def test_images_of_a_split_in_one_folder_with_a_list(problem, tmp_path, console):
    names, data, *_ = problem
    expected = resnet_jax.evaluate(names[0], data=data, console=console)
    (tmp_path / "test").mkdir()
    lines = []
    for file in sorted((Path(data) / "test").rglob("*.png")):
        lines.append(f"{file.parent.name}{file.name} {file.parent.name}\n")
        shutil.copy(file, tmp_path / "test" / lines[-1].split()[0])
    (tmp_path / "test.txt").write_text("".join(lines))
    for kind in ("ant", "bee", "cat"):
        (tmp_path / "train" / kind).mkdir(parents=True)
    found = resnet_jax.evaluate(names[0], data=str(tmp_path), console=console)
    assert (found["errors"], found["count"]) == (expected["errors"], 15)


def test_broken_images_stop_or_are_left_out(problem, tmp_path, console):
    names = problem[0]
    write_image_folder(tmp_path, per_class={"test": 2}, shape=(SIZE, SIZE))
    (tmp_path / "test" / "bee" / "1.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bee/1\.png cannot be decoded"):
        evaluate_nets(names, data=str(tmp_path), console=console)
    skip = {"data.on_error": "skip"}
    found = evaluate_nets(names, data=str(tmp_path), overrides=skip, console=console)
    assert [net["count"] for net in found["nets"]] == [5, 5]
    assert "1.png" in found["skipped"][0]


def test_seeds_have_a_mean_and_a_deviation(tfds_dir, tmp_path, console):
    config = make_tiny_config(tfds_dir)
    config.training.steps, config.seeds = 2, 2
    result = resnet_jax.train(config, tmp_path / "runs", make_console())
    found = evaluate_nets([tmp_path / "runs"], console=console)
    errors = [run["test_errors"] for run in result["runs"].values()]
    assert [net["errors"] for net in found["nets"]] == errors
    assert found["spread"]["count"] == 2
    assert found["spread"]["mean"] == pytest.approx(result["test_error"])
    assert "(2 seeds)" in console.file.getvalue()
    with pytest.raises(UserError, match="runs of 2 seeds"):
        resnet_jax.evaluate(tmp_path / "runs", console=console)


def test_the_command_writes_json_and_a_page(problem, tmp_path, capsys):
    names, data, *_ = problem
    ensemble = tmp_path / "ensemble.py"
    ensemble.write_text(
        "import ml_collections\n"
        "def get_config(folder=''):\n"
        f"    members = ({names[0]!r}, ({names[1]!r}, '{PROTOCOL},flip=true'))\n"
        "    return ml_collections.ConfigDict({'members': members})\n"
    )
    files = [tmp_path / "result.json", tmp_path / "page.html"]
    command = ["evaluate", "--ensemble-config", str(ensemble), "--data", data]
    written = ["--json", str(files[0]), "--html", str(files[1])]
    assert main([*command, *written]) == 0
    printed = capsys.readouterr().out
    assert "ensemble of 2 nets, mean of probabilities" in printed
    assert "(test-time augmentation)" in printed
    result = json.loads(files[0].read_text())
    assert result["nets"][1]["protocol"]["flip"] is True
    assert len(result["nets"][0]["checksum"]) == 64
    assert result["data"]["counts"] == {"test": 15}
    page = files[1].read_text()
    assert page.count("<svg") == 6
    assert "Confusions" in page
    mistakes = [net["mistakes"] for net in [*result["nets"], result["ensemble"]]]
    assert page.count("<img") == sum(map(len, mistakes)) > 0
    assert main(["evaluate", "--data", data]) == 1
    assert "give nets with" in capsys.readouterr().err


FAULTS = {
    "brings no data": {},
    "there is no protocol": {"data": "DATA", "protocol": "middle"},
    "no split 'tset'": {"data": "DATA", "split": "tset"},
    "is not a run, and has no batches": {"data": "DATA", "precise_batches": 2},
    "cannot be changed for a trained net": {"overrides": {"model.name": "resnet18"}},
    "has no classifier": {"data": "DATA", "nets": ["HEADLESS"]},
    "give a list of nets": {"data": "DATA", "nets": "runs/a"},
    "with at least one": {"data": "DATA", "nets": []},
    "their size is unknown: give size, such as ten_crop:size=32": {
        "data": "DATA",
        "protocol": "ten_crop",
    },
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_faults_are_named(problem, sentence, console):
    names, data, *_ = problem
    options = {k: data if v == "DATA" else v for k, v in FAULTS[sentence].items()}
    nets = options.pop("nets", names)
    if nets == ["HEADLESS"]:
        net = resnet_jax.load_net(names[0])
        nets = [dataclasses.replace(net, model=net.model.clone(num_classes=None))]
    with pytest.raises(UserError, match=sentence):
        evaluate_nets(nets, console=console, **options)
