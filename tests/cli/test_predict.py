"""resnet-jax predict, on the files of a user."""

import io
import json
import re

import numpy as np
import pytest
import rich.console
from PIL import Image

import resnet_jax
from resnet_jax.analysis import predictions
from resnet_jax.cli import main
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.errors import UserError
from resnet_jax.evaluation.classifier import Classifier
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.evaluation.protocols import Center
from resnet_jax.models import create_model
from resnet_jax.models.highway import HighwayNet
from tests.models.reference import random_variables

CLASSES = ("n01440764", "<b>&", "a name that is far too long for one column of a table")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A net of CIFAR's size that says what it expects of an image."""
    model = create_model("cifar_resnet8", num_classes=3)
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    variables["params"]["head"]["kernel"] /= 20
    file = tmp_path_factory.mktemp("weights") / "net.safetensors"
    content = {
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "protocol": {"kind": "center", "size": 32, "shorter_side": 32},
        "class_names": CLASSES,
    }
    metadata = {"preprocessing": json.dumps(content)}
    options = {"name": "cifar_resnet8", "metadata": metadata}
    resnet_jax.save_weights(file, variables, model, **options)
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pictures at several depths, and a text."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number, name in enumerate(
        ("b.png", "a.jpg", "in/c.gif", "in/er/d.webp", "e.PNG")
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + number, 50, 3), np.uint8)
        kind = name.split(".")[1].upper().replace("JPG", "JPEG")
        Image.fromarray(pixels).save(folder / name, kind)
    (folder / "notes.txt").write_text("no picture")
    return folder


def predict(capsys, *arguments):
    status = main(["predict", *map(str, arguments)])
    return status, *(text.splitlines() for text in capsys.readouterr())


def test_a_folder(weights, folder, capsys, tmp_path):
    lines, page = tmp_path / "found.jsonl", tmp_path / "page.html"
    status, out, err = predict(
        capsys,
        folder,
        "--weights",
        weights,
        "--json",
        lines,
        "--html",
        page,
        "--top",
        2,
    )
    assert (status, err) == (0, [])
    names = ["a.jpg", "b.png", "e.PNG", "in/c.gif", "in/er/d.webp"]
    paths = [str(folder / name) for name in names]
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["image"] for row in rows] == paths
    expected = Classifier.from_pretrained(weights)(paths, top=2)
    for row, prediction in zip(rows, expected, strict=True):
        assert tuple(row["classes"]) == prediction.classes
        assert tuple(row["names"]) == prediction.names
        np.testing.assert_allclose(row["probabilities"], prediction.probabilities)
    # The table: a head, two rows for each, and where the page is.
    assert out[0].split() == ["image", "class", "probability"]
    assert [line.split()[0] for line in out[1:-1:2]] == paths
    first = expected[0]
    assert re.split(r" {2,}", out[1])[1:] == [
        first.names[0], f"{100 * first.probabilities[0]:.1f} %"
    ]  # fmt: skip
    assert re.split(r" {2,}", out[2])[1] == first.names[1]
    assert out[-1] == f"page: {page}"
    html = page.read_text()
    assert html.count("<img") == 10  # each picture and its map
    assert "<b>&" not in html
    assert "tench" in html
    assert "&lt;b&gt;&amp;" in html


def test_broken_files_are_named_and_the_rest_goes_on(weights, folder, capsys, tmp_path):
    empty, missing = tmp_path / "empty.jpg", tmp_path / "missing.jpg"
    empty.write_bytes(b"")
    bare = tmp_path / "bare"
    bare.mkdir()
    picture = folder / "a.jpg"
    status, out, err = predict(
        capsys, picture, empty, bare, missing, picture, "--weights", weights, "--top=1"
    )
    assert status == 1
    assert len(out) == 3  # the same picture twice
    assert out[1] == out[2]
    assert err[0].startswith(f"resnet-jax: folder {bare} holds no images (.jpg")
    assert f"image {empty} cannot be decoded" in err[1]
    assert f"image {missing} cannot be read: No such file" in err[2]
    assert err[3:] == [
        "resnet-jax: error: 3 of 5 could not be read: see the lines above"
    ]


def test_nothing_to_read_gets_one_sentence(weights, capsys, tmp_path):
    empty = tmp_path / "empty.jpg"
    for make, sentence in (
        (lambda: None, f"folder {tmp_path} holds no images"),
        (lambda: empty.write_bytes(b""), f"image {empty} cannot be decoded"),
    ):
        make()
        status, _, err = predict(capsys, tmp_path, "--weights", weights)
        assert status == 1
        assert len(err) == 1
        assert f"resnet-jax: error: {sentence}" in err[0]
    (tmp_path / "other.png").write_bytes(b"nothing")
    status, _, err = predict(capsys, tmp_path, "--weights", weights)
    assert (status, len(err)) == (1, 3)
    assert err[-1] == "resnet-jax: error: none of the 2 images can be read"


@pytest.mark.parametrize("option", ["json_path", "html_path"])
def test_files_that_cannot_be_written(weights, folder, tmp_path, console, option):
    classifier = Classifier.from_pretrained(weights)
    paths = {tmp_path: "Is a directory", tmp_path / "no" / "file": "No such file"}
    if option == "json_path":
        paths["/dev/full"] = "No space left"
    for path, reason in paths.items():
        with pytest.raises(UserError, match=f"{path} cannot be written: {reason}"):
            predictions.predict_files(
                classifier, [folder / "a.jpg"], console=console, **{option: path}
            )


@pytest.mark.parametrize("width", [50, 80, 200])
def test_the_table_fits_a_terminal(weights, folder, width):
    file = io.StringIO()
    console = rich.console.Console(file=file, width=width, force_terminal=True)
    classifier = Classifier.from_pretrained(weights)
    predictions.predict_files(classifier, [folder], console=console)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == 1 + 5 * 3
    ends = [line[: line.index("  ")] for line in lines[1::3]]
    assert all(end.endswith(name) for end, name in zip(ends, ("a.jpg", "b.png")))
    assert any(re.search(r"a name .*…", line) for line in lines) == (width < 200)


def test_a_page_holds_the_first_pictures(weights, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(predictions, "MOST_ON_PAGE", 2)
    console = rich.console.Console(file=io.StringIO())
    page = tmp_path / "page.html"
    classifier = Classifier.from_pretrained(weights, protocol="ten_crop")
    predictions.predict_files(classifier, [folder], html_path=page, console=console)
    html = page.read_text()
    assert html.count("<img") == 4
    assert "The first 2 of 5 images." in html


def test_a_net_without_maps_has_a_page_too(folder):
    model = HighwayNet(widths=(4, 4), highway_layers=(1, 1), num_classes=3)
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    half = np.full((1, 1, 3), 0.5, np.float32)
    statistics, view = PixelStatistics(half, half), Center(32, 32)
    net = TrainedNet("", "highway", {}, model, variables, statistics, view, None)
    picture = folder / "a.jpg"
    found = Classifier(net)(picture)
    page = predictions.predictions_page(Classifier(net), [picture], found)
    assert page.count("<img") == 1
    assert "activation map" not in page
