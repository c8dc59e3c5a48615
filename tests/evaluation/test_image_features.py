"""Features of images against the net itself, and against logits by its classifier."""

import dataclasses
import shutil

import cv2
import jax
import numpy as np
import pytest

from resnet_jax import create_model, save_weights
from resnet_jax.cli import main
from resnet_jax.data.transforms import PixelStatistics, normalize, to_unit
from resnet_jax.errors import UserError
from resnet_jax.evaluation.features import (
    extract_features,
    load_features,
    save_features,
)
from resnet_jax.evaluation.nets import TrainedNet, load_net
from resnet_jax.evaluation.protocols import Center, Stored
from tests.models.reference import random_variables

MODEL = create_model("cifar_resnet8", num_classes=3)
PIXELS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    variables = random_variables(MODEL, np.zeros((1, 10, 12, 3), np.float32))
    save_weights(path, variables, MODEL, name="cifar_resnet8")
    return path


@pytest.fixture(scope="module")
def net(weights):
    return load_net(weights, **PIXELS)


def expected(net, folder, names):
    """By the net as it is, one image at a time, as OpenCV reads it."""
    body = net.model.clone(num_classes=None)
    rows = []
    for name in names:
        image = cv2.imread(str(folder / name))[None, ..., ::-1]
        images = normalize(to_unit(image), net.statistics)
        rows.append(body.apply(net.variables, images, train=False)[0])
    return np.stack(rows)


def test_features_of_class_folders_are_the_nets_in_their_order(net, image_folder):
    folder = image_folder / "train"
    found = extract_features(net, folder, batch_size=8)
    assert found.class_names == ("ant", "bee", "cat")
    assert found.names == tuple(
        f"{name}/{index}.png" for name in found.class_names for index in range(6)
    )
    assert found.labels.tolist() == 6 * [0] + 6 * [1] + 6 * [2]
    assert found.features.dtype == np.float32
    features = expected(net, folder, found.names)
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-4)
    again = extract_features(net, image_folder, split="train", batch_size=5)
    np.testing.assert_allclose(again.features, features, rtol=1e-4, atol=1e-4)
    assert again.names == tuple(f"train/{name}" for name in found.names)


def test_a_class_may_be_called_train(net, image_folder):
    folder = image_folder / "train"
    (folder / "ant").rename(folder / "train")
    assert extract_features(net, folder).class_names == ("bee", "cat", "train")


def test_the_classifier_of_features_gives_the_nets_logits(net, image_folder):
    found = extract_features(net, image_folder, split="test")
    head = jax.device_get(net.variables["params"]["head"])
    images = [cv2.imread(str(image_folder / n))[..., ::-1] for n in found.names]
    images = normalize(to_unit(np.stack(images)), net.statistics)
    logits = net.model.apply(net.variables, images, train=False)
    ours = found.features @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(ours, logits, rtol=1e-4, atol=1e-4)


def test_a_part_of_a_named_data_set(tfds_dir):
    """The digits: grey images of one size, with numbers for names."""
    grey = create_model("mnist_plain10", num_classes=10)
    variables = random_variables(grey, np.zeros((1, 8, 8, 1), np.float32))
    pixels = PixelStatistics(np.full((1, 1, 1), 0.5), np.ones((1, 1, 1)))
    net = TrainedNet("", "", {}, grey, variables, pixels, Stored(), None)
    found = extract_features(
        net, "digits", split="test[:20]", overrides={"data.data_dir": tfds_dir}
    )
    assert found.features.shape == (20, 71)
    assert len(set(found.names)) == 20
    assert found.labels.max() < 10 == len(found.class_names)


def test_flat_images_have_no_labels_and_need_one_shape(net, tmp_path):
    rng = np.random.default_rng(0)
    for index, shape in enumerate([(10, 12, 3), (10, 12, 3), (12, 10, 3)]):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{index}.png"), image)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"2\.png is 10x12 and the first is 12x10"):
        extract_features(net, tmp_path)
    resized = dataclasses.replace(net, protocol=Center(size=8, shorter_side=9))
    found = extract_features(resized, tmp_path)
    assert found.names == ("0.png", "1.png", "2.png")
    assert found.labels.tolist() == [-1, -1, -1]
    assert found.class_names == ()


def test_broken_images_stop_or_are_named_and_left_out(net, image_folder, console):
    folder = image_folder / "train"
    whole = extract_features(net, folder)
    (folder / "bee" / "2.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"bee/2\.png cannot be decoded"):
        extract_features(net, folder)
    found = extract_features(
        net, folder, overrides={"data.on_error": "skip"}, console=console
    )
    assert console.file.getvalue().count("warning: skipped: image") == 1
    assert found.names == tuple(n for n in whole.names if n != "bee/2.png")
    kept = np.delete(whole.features, 8, axis=0)
    np.testing.assert_allclose(found.features, kept, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_the_command_writes_a_file_that_loads(weights, net, image_folder, suffix):
    out = image_folder / f"features{suffix}"
    command = ["features", "--weights", str(weights), str(image_folder), "--split"]
    command += ["test", "--out", str(out), "--mean", "0.4,0.5,0.6"]
    command += ["--std", "0.2,0.3,0.4"]
    assert main(command) == 0
    found, direct = (
        load_features(out),
        extract_features(net, image_folder, split="test"),
    )
    np.testing.assert_array_equal(found.features, direct.features)
    np.testing.assert_array_equal(found.labels, direct.labels)
    assert (found.names, found.class_names) == (direct.names, direct.class_names)
    assert main(command) == 1  # it exists
    assert main([*command, "--force"]) == 0


def test_wrong_sources_and_targets_are_refused(net, image_folder, weights):
    empty = image_folder / "empty"
    empty.mkdir()
    for data, options, sentence in (
        (image_folder / "none", {}, "none does not exist"),
        (empty, {}, "has no folders"),
        (image_folder, {"split": "val"}, "no split 'val'"),
        (None, {}, "brings no data"),
        (empty, {"batch_size": 0}, "at least 1"),
        (empty, {"out": "features.csv"}, r"ends in \.safetensors or \.npz"),
    ):
        with pytest.raises(UserError, match=sentence):
            extract_features(net, data, **options)
    shutil.copy(weights, image_folder / "weights.npz")
    for file in (weights, image_folder / "weights.npz", empty / "none.npz"):
        with pytest.raises(UserError, match=r"holds no features|none"):
            load_features(file)
    with pytest.raises(UserError, match="ends in"):
        save_features("features.csv", None)
