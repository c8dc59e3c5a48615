"""The config files are the paper's recipes (section 3.4 and 4.2), typed out here."""

import ast

import pytest

from resnet_jax.config import Config, DetectionConfig, derive, flatten, load_config
from resnet_jax.errors import UserError
from tests.conftest import REPOSITORY

CONFIGS = REPOSITORY / "configs"


def config_of(spec):
    schema = DetectionConfig if spec.startswith("detection/") else Config
    return load_config(f"{CONFIGS}/{spec}", schema=schema)


PAPER_SGD = {
    "optimizer.learning_rate": 0.1,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": False,
    "optimizer.weight_decay": 1e-4,
    "optimizer.ema_decay": None,
    "augmentation.flip": True,
    "data.normalization": "per_pixel_mean",
    "schedule.factor": 0.1,
}


def test_cifar10_is_section_4_2():
    values = flatten(config_of("cifar10.py:cifar_resnet56"))
    expected = PAPER_SGD | {
        "model.name": "cifar_resnet56",
        "model.batch_norm_groups": 2,
        "model.shortcut": None,  # the CIFAR nets' own is A
        "training.steps": 64_000,
        "training.global_batch_size": 128,
        "schedule.kind": "piecewise",
        "schedule.boundaries_steps": (32_000, 48_000),
        "schedule.warmup_learning_rate": None,
        "augmentation.pad": 4,
        "data.holdout_examples": 0,
    }
    assert expected.items() <= values.items()


def test_cifar10_warms_up_110_layers_alone():
    values = flatten(config_of("cifar10.py:cifar_resnet110"))
    assert values["schedule.warmup_learning_rate"] == 0.01
    assert values["schedule.warmup_until_error"] == 0.8


def test_cifar10_takes_164_epochs():
    derived = derive(config_of("cifar10.py"), 50_000)
    assert derived.epochs == pytest.approx(163.84)


@pytest.mark.parametrize(
    ("net", "shortcut"), [("resnet34", "A"), ("resnet50", None), ("plain34", None)]
)
def test_he2015_is_section_3_4(net, shortcut):
    values = flatten(config_of(f"recipes/he2015.py:{net}"))
    expected = PAPER_SGD | {
        "model.name": net,
        "model.shortcut": shortcut,
        "model.stride_version": "v1",
        "model.batch_norm_groups": 8,
        "training.steps": 600_000,
        "training.global_batch_size": 256,
        "schedule.kind": "plateau",
        "augmentation.shorter_side": (256, 480),
        "augmentation.color_noise": 0.1,
        "data.image_size": 224,
        "data.eval_shorter_side": 256,
    }
    assert expected.items() <= values.items()
    assert values["data.holdout_examples"] > 0


def config_files():
    files = (str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.py"))
    return sorted(file for file in files if file != "ensemble.py")  # of evaluate


@pytest.mark.parametrize("file", config_files())
def test_every_file_resolves_and_says_its_command(file):
    config_of(file)
    documentation = ast.get_docstring(ast.parse((CONFIGS / file).read_text()))
    command = "detect train" if file.startswith("detection/") else "train"
    assert f"resnet-jax {command} --config {file.removesuffix('.py')}" in documentation


def test_voc07_is_appendix_a():
    values = flatten(config_of("detection/voc07.py"))
    expected = {
        "model.name": "resnet101",
        "data.shorter_side": 600,
        "data.longer_side": 1000,
        "detector.anchor_sizes": (128.0, 256.0, 512.0),
        "detector.anchor_ratios": (0.5, 1.0, 2.0),
        "detector.rpn_high": 0.7,
        "detector.rpn_low": 0.3,
        "detector.rpn_samples": 256,
        "detector.proposal_nms": 0.7,
        "detector.train_proposals": 2000,
        "detector.test_proposals": 300,
        "detector.roi_samples": 128,
        "detector.roi_fraction": 0.25,
        "detector.roi_high": 0.5,
        "detector.roi_low": 0.1,
        "detector.nms": 0.3,
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 5e-4,
        "training.steps": 80_000,
        "schedule.boundaries_steps": (60_000,),
        "schedule.factor": 0.1,
    }
    assert expected.items() <= values.items()
    eight = flatten(config_of("detection/voc07.py:8"))
    assert eight["training.global_batch_size"] == 8
    assert eight["training.steps"] == 10_000
    assert eight["optimizer.learning_rate"] == pytest.approx(8e-3)


@pytest.mark.parametrize("file", ["digits.py", "fashion_mnist.py"])
def test_the_small_ones_resolve(file):
    assert config_of(file).model.name == "cifar_resnet20"


@pytest.mark.parametrize("net", ["cifar_resnet20", "cifar_plain56", "cifar_resnet56"])
def test_degradation_is_one_recipe_for_all_nets(net):
    shallow = flatten(config_of("degradation.py"))
    assert shallow.pop("model.name") == "cifar_plain20"
    values = flatten(config_of(f"degradation.py:{net}"))
    assert values.pop("model.name") == net
    assert values == shallow


@pytest.mark.parametrize(
    ("source", "net"),
    [
        ("torchvision:wide_resnet50_2.IMAGENET1K_V2", "wide_resnet50_2"),
        ("hf-hub:timm/resnet50.a1_in1k@v1.0", "resnet50"),
        ("torchvision:vgg16", "vgg16"),
    ],
)
def test_fine_tuning_takes_the_name_of_weights(source, net):
    model = config_of(f"finetune.py:{source}").model
    assert (model.name, model.weights, model.new_head) == (net, source, True)


def test_fine_tuning_takes_a_net_and_needs_its_weights():
    file, overrides = f"{CONFIGS}/finetune.py:resnet18", {"model.weights": "a.pth"}
    model = load_config(file, overrides).model
    assert (model.name, model.weights, model.new_head) == ("resnet18", "a.pth", True)
    with pytest.raises(UserError, match=r"needs model\.weights: set it too"):
        load_config(file)
