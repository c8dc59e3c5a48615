"""Trained nets from runs, files and hubs, and what they expect of an image."""

import json

import jax
import numpy as np
import pytest

import resnet_jax
from resnet_jax.data.sources.imagenet import class_ids
from resnet_jax.errors import UserError
from resnet_jax.evaluation import nets
from resnet_jax.evaluation.convert import convert_weights
from resnet_jax.evaluation.nets import load_net
from resnet_jax.evaluation.protocols import Center, Stored
from resnet_jax.models import create_model
from tests.models.reference import random_variables

IMAGENET_MEAN = [0.485, 0.456, 0.406]


def saved(path, name="resnet18", layout="flax", **options):
    model = create_model(name, **options)
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32))
    resnet_jax.save_weights(path, variables, model, name=name, layout=layout)
    return model, variables


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """A file in torch's layout, as torchvision publishes it."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    saved(path, layout="torch")
    return path


def test_a_net_of_imagenets_size(resnet18):
    net = load_net(resnet18)
    assert (net.name, net.num_classes, net.channels) == ("resnet18", 1000, 3)
    assert net.protocol == Center(224, 256)
    np.testing.assert_allclose(np.ravel(net.statistics.mean), IMAGENET_MEAN)
    assert net.class_names == class_ids()


@pytest.mark.parametrize(
    ("name", "shorter_side"),
    [
        ("resnet18", 256),
        ("resnet18.IMAGENET1K_V1", 256),
        ("resnet50.IMAGENET1K_V2", 232),
    ],
)
def test_torchvisions_resize(resnet18, monkeypatch, name, shorter_side):
    monkeypatch.setattr("resnet_jax.weights.load_save.locate", lambda _: resnet18)
    net = load_net(f"torchvision:{name}", model="resnet18")
    assert net.protocol == Center(224, shorter_side)


def test_timms_config(resnet18, monkeypatch):
    config = {
        "architecture": "resnet18",
        "pretrained_cfg": {
            "input_size": [3, 288, 288],
            "crop_pct": 0.95,
            "interpolation": "bicubic",
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.2, 0.1],
        },
    }
    bare = resnet18.with_name("model.safetensors")
    model = create_model("resnet18")
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32))
    resnet_jax.save_weights(bare, variables, model, layout="torch")
    monkeypatch.setattr("resnet_jax.weights.load_save.locate", lambda _: bare)
    monkeypatch.setattr(nets, "hub_config", lambda _: config)
    net = load_net("hf-hub:timm/resnet18.a1_in1k")
    assert net.name == "resnet18"
    assert net.protocol == Center(288, 303, "bicubic")
    np.testing.assert_allclose(np.ravel(net.statistics.std), [0.2, 0.2, 0.1])


def test_a_file_that_says_nothing_needs_a_mean(tmp_path):
    path = tmp_path / "small.safetensors"
    saved(path, "cifar_resnet8", num_classes=5)
    with pytest.raises(UserError, match="does not say what images it expects"):
        load_net(path)
    net = load_net(path, mean=[0.5, 0.5, 0.5], std=[1, 1, 1])
    assert net.protocol == Stored()
    assert net.class_names is None
    grey, half, zero = [0.5], [0.5, 0.5, 0.5], [1, 0, 1]
    for options, sentence in (
        ({"mean": half}, "both the mean and the std"),
        ({"mean": grey, "std": half}, "for images of 3 channels"),
        ({"mean": half, "std": zero}, "must be above 0"),
        ({"checkpoint": 4}, "is not a workdir"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_net(path, **options)


def test_weights_of_a_run_keep_what_it_expects(tiny_config, tmp_path, console):
    workdir, file = tmp_path / "run", tmp_path / "run.safetensors"
    tiny_config.training.steps = 1
    resnet_jax.train(tiny_config, workdir, console)
    convert_weights(workdir, file)
    run, net = load_net(workdir), load_net(file)
    assert net.protocol == run.protocol == Stored()
    assert net.class_names == run.class_names == tuple("0123456789")
    assert net.checksum == run.checksum
    jax.tree.map(np.testing.assert_array_equal, net.statistics, run.statistics)
    # And through another file.
    again = tmp_path / "torch.safetensors"
    convert_weights(file, again)
    assert load_net(again).class_names == net.class_names
    assert load_net(again).checksum == net.checksum
    with pytest.raises(UserError, match="leave them out"):
        load_net(workdir, model="cifar_resnet8")


def test_damaged_preprocessing_is_named(tmp_path):
    path = tmp_path / "damaged.safetensors"
    model = create_model("cifar_resnet8")
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    for content in ("{", json.dumps({"mean": [0.5]}), json.dumps({"protocol": 3})):
        metadata = {nets.PREPROCESSING: content}
        resnet_jax.save_weights(
            path, variables, model, name="cifar_resnet8", metadata=metadata
        )
        with pytest.raises(UserError, match=r"damaged|protocol"):
            load_net(path)


def test_a_net_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="give the workdir of a run, a file of weights"):
        load_net(tmp_path / "run")


def test_a_mean_must_be_finite(resnet18):
    numbers = {"mean": [float("nan")] * 3, "std": [0.5] * 3}
    with pytest.raises(UserError, match="must be finite"):
        load_net(resnet18, model="resnet18", **numbers)
