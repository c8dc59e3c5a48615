"""The ImageNet recipes, by the numbers of their sources.

he2015 is in test_files. What each number is taken from:

- fb2016: opts.lua, train.lua, datasets/imagenet.lua and datasets/transforms.lua of
  fb.resnet.torch, and the command for ResNet-50 in its README.
- goyal2017: sections 2.2 and 5.1 of arXiv:1706.02677.
- rsb_*: the table of procedures of arXiv:2110.00476; timm's train.py, optim/lamb.py.
- torchvision_v2: references/classification/train.py and the command of its README.
"""

import ast
import re

import jax.numpy as jnp
import pytest

from resnet_jax.config import derive, flatten, load_config
from resnet_jax.errors import UserError
from resnet_jax.training.schedule import Schedule
from tests.conftest import REPOSITORY

RECIPES = REPOSITORY / "configs" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))
TRAINING_IMAGES = 1_281_167

INCEPTION_CROPS = {
    "augmentation.crop_area": (0.08, 1.0),
    "augmentation.crop_aspect": (3 / 4, 4 / 3),
    "augmentation.shorter_side": None,
    "augmentation.flip": True,
    "data.normalization": "imagenet",
    "data.holdout_examples": 0,
}
NO_MIXING = {
    "augmentation.policy": None,
    "augmentation.repeats": 1,
    "augmentation.erasing_probability": 0.0,
    "augmentation.mixup_alpha": 0.0,
    "augmentation.cutmix_alpha": 0.0,
    "loss.kind": "softmax",
    "loss.label_smoothing": 0.0,
    "optimizer.kind": "sgd",
    "optimizer.ema_decay": None,
}
FB2016 = (
    INCEPTION_CROPS
    | NO_MIXING
    | {
        "model.batch_norm_groups": 4,
        "data.image_size": 224,
        "data.eval_image_size": None,
        "data.eval_shorter_side": 256,
        "data.eval_interpolation": "bicubic",
        "augmentation.color_jitter": (0.4, 0.4, 0.4),
        "augmentation.color_noise": 0.1,
        "optimizer.learning_rate": 0.1,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": True,
        "optimizer.weight_decay": 1e-4,
        "optimizer.weight_decay_scope": "all",
        "schedule.kind": "piecewise",
        "schedule.boundaries_epochs": (30.0, 60.0),
        "schedule.factor": 0.1,
        "training.epochs": 90.0,
        "training.global_batch_size": 256,
    }
)
GOYAL2017 = (
    INCEPTION_CROPS
    | NO_MIXING
    | {
        "model.zero_init_last": True,
        "model.batch_norm_groups": 256,  # of 32 images each
        "model.batch_norm_momentum": 0.9,
        "data.image_size": 224,
        "augmentation.color_jitter": None,
        "augmentation.color_noise": 0.0,
        "optimizer.learning_rate": 3.2,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": True,
        "optimizer.weight_decay": 1e-4,
        "optimizer.weight_decay_scope": "all_but_norm",
        "schedule.kind": "piecewise",
        "schedule.boundaries_epochs": (30.0, 60.0, 80.0),
        "schedule.factor": 0.1,
        "schedule.warmup_epochs": 5.0,
        "schedule.warmup_initial_learning_rate": 0.1,
        "training.epochs": 90.0,
        "training.global_batch_size": 8192,
    }
)
RSB = INCEPTION_CROPS | {
    "model.zero_init_last": True,
    "data.eval_shorter_side": 235,  # floor(224 / 0.95)
    "data.eval_interpolation": "bicubic",
    "augmentation.policy": "randaugment",
    "augmentation.policy_operations": 2,
    "augmentation.policy_magnitude_std": 0.5,
    "augmentation.cutmix_alpha": 1.0,
    "augmentation.color_jitter": None,
    "augmentation.color_noise": 0.0,
    "augmentation.erasing_probability": 0.0,
    "loss.kind": "sigmoid",
    "loss.target_threshold": 0.2,
    "optimizer.kind": "lamb",
    "optimizer.momentum": 0.9,
    "optimizer.second_momentum": 0.999,
    "optimizer.epsilon": 1e-6,
    "optimizer.weight_decay_scope": "kernels",
    "optimizer.max_grad_norm": 1.0,
    "optimizer.ema_decay": None,
    "schedule.kind": "cosine",
    "schedule.final_learning_rate": 1e-6,
    "schedule.warmup_epochs": 5.0,
    "schedule.warmup_initial_learning_rate": 1e-4,
    "training.global_batch_size": 2048,
}
RSB_A1 = RSB | {
    "model.stochastic_depth_rate": 0.05,
    "data.image_size": 224,
    "data.eval_image_size": None,
    "augmentation.policy_magnitude": 7.0,
    "augmentation.repeats": 3,
    "augmentation.mixup_alpha": 0.2,
    "loss.label_smoothing": 0.1,
    "optimizer.learning_rate": 5e-3,
    "optimizer.weight_decay": 0.01,
    "training.epochs": 600.0,
}
RSB_A2 = RSB_A1 | {
    "augmentation.mixup_alpha": 0.1,
    "loss.label_smoothing": 0.0,
    "optimizer.weight_decay": 0.02,
    "training.epochs": 300.0,
}
RSB_A3 = RSB_A2 | {
    "model.stochastic_depth_rate": None,
    "data.image_size": 160,
    "data.eval_image_size": 224,
    "augmentation.policy_magnitude": 6.0,
    "augmentation.repeats": 1,
    "optimizer.learning_rate": 8e-3,
    "training.epochs": 100.0,
}
TORCHVISION_V2 = INCEPTION_CROPS | {
    "model.zero_init_last": None,  # torchvision's nets start with ones
    "model.stochastic_depth_rate": None,
    "model.batch_norm_groups": 8,
    "data.image_size": 176,
    "data.eval_image_size": 224,
    "data.eval_shorter_side": 232,
    "data.eval_interpolation": "bilinear",
    "augmentation.policy": "trivialaugment",
    "augmentation.repeats": 4,
    "augmentation.erasing_probability": 0.1,
    "augmentation.mixup_alpha": 0.2,
    "augmentation.cutmix_alpha": 1.0,
    "augmentation.color_jitter": None,
    "loss.kind": "softmax",
    "loss.label_smoothing": 0.1,
    "optimizer.kind": "sgd",
    "optimizer.learning_rate": 0.5,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": False,
    "optimizer.weight_decay": 2e-5,
    "optimizer.weight_decay_scope": "all_but_norm",
    "optimizer.max_grad_norm": None,
    # 1 - 2e-5 * (8 GPUs * 128 images * 32 steps / 600 epochs)
    "optimizer.ema_decay": pytest.approx(0.99890773, abs=1e-8),
    "optimizer.ema_every_steps": 32,
    "schedule.kind": "cosine",
    "schedule.final_learning_rate": 0.0,
    "schedule.warmup_epochs": 5.0,
    "schedule.warmup_initial_learning_rate": 0.005,
    "training.epochs": 600.0,
    "training.global_batch_size": 1024,
}
PUBLISHED = {
    "fb2016": FB2016,
    "goyal2017": GOYAL2017,
    "rsb_a1": RSB_A1,
    "rsb_a2": RSB_A2,
    "rsb_a3": RSB_A3,
    "torchvision_v2": TORCHVISION_V2,
}
EXPECTED_ERRORS = {
    "he2015": ("24.7", "22.85"),
    "fb2016": ("24.01", "30.43"),
    "goyal2017": ("23.74",),
    "rsb_a1": ("19.6",),
    "rsb_a2": ("20.2",),
    "rsb_a3": ("21.9",),
    "torchvision_v2": ("19.142",),  # 100 - 80.858
}


def recipe(name):
    return load_config(f"{RECIPES / name}.py:resnet50")


def test_every_recipe_has_its_numbers_here():
    assert {*PUBLISHED, "he2015"} == set(NAMES)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_recipe_has_the_numbers_of_its_source(name):
    found = flatten(recipe(name))
    assert {key: found[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert found["model.name"] == "resnet50"


@pytest.mark.parametrize(
    ("name", "steps", "boundaries", "warmup", "rates"),
    [
        # An epoch is 1,281,167 / batch: 5,004.56, 156.39, 625.57 and 1,251.14 steps.
        ("fb2016", 450_411, (150_137, 300_274), 0, {0: 0.1, 150_137: 0.01}),
        (
            "goyal2017",
            14_076,
            (4_692, 9_384, 12_512),
            782,
            {0: 0.1 + 3.1 / 782, 781: 3.2, 4_692: 0.32, 9_384: 0.032, 12_512: 0.0032},
        ),
        ("rsb_a1", 375_342, (), 3_128, {0: 1e-4 + 49e-4 / 3_128, 3_128: 5e-3}),
        ("rsb_a2", 187_671, (), 3_128, {3_127: 5e-3, 187_671: 1e-6}),
        ("rsb_a3", 62_557, (), 3_128, {3_128: 8e-3, 62_557: 1e-6}),
        (
            "torchvision_v2",
            750_684,
            (),
            6_256,
            # Half of the highest rate stands in the middle of the cosine.
            {0: 0.005 + 0.495 / 6_256, 6_256: 0.5, 378_470: 0.25, 750_684: 0.0},
        ),
    ],
)
def test_steps_and_rates_follow(name, steps, boundaries, warmup, rates):
    config = recipe(name)
    derived = derive(config, TRAINING_IMAGES)
    assert derived.steps == steps
    assert derived.boundaries == boundaries
    assert derived.warmup_steps == warmup
    schedule = Schedule(config.optimizer, config.schedule, derived)
    for step, rate in rates.items():
        found = float(schedule.rate(schedule.init(), jnp.int32(step)))
        assert found == pytest.approx(rate, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_where_it_is_from_and_what_differs(name):
    tree = ast.parse((RECIPES / f"{name}.py").read_text())
    documentation = re.sub(r"\s+", " ", ast.get_docstring(tree))
    assert f"resnet-jax train --config recipes/{name}:" in documentation
    assert re.search(r"Source: .*https://", documentation)
    assert "Expected from the source" in documentation
    for error in EXPECTED_ERRORS[name]:
        assert f"{error} " in documentation
    assert "Measured here: not measured." in documentation
    assert re.search(r"Differences from the original: - .{20}", documentation)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_recipes_names_each(name):
    table = (REPOSITORY / "docs" / "recipes.md").read_text()
    assert f"`recipes/{name}`" in table
    for error in EXPECTED_ERRORS[name][:1]:
        assert error in table


def test_imagenet_takes_a_net_and_a_recipe():
    path = REPOSITORY / "configs" / "imagenet.py"
    assert load_config(str(path)) == recipe("he2015")
    assert load_config(f"{path}:resnet50") == recipe("he2015")
    assert load_config(f"{path}:resnet50,rsb_a2") == recipe("rsb_a2")
    assert load_config(f"{path}:resnet34,fb2016").model.name == "resnet34"


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ("resnet50,rsb_a4", "there is no recipe 'rsb_a4'; did you mean rsb_a"),
        ("resnet50,fb2015", "did you mean fb2016?"),
        ("resnet51,rsb_a2", "did you mean resnet50?"),
        ("resnet50,paper", "valid are fb2016, goyal2017, he2015, rsb_a1"),
    ],
)
def test_imagenet_refuses_what_there_is_not(choice, sentence):
    with pytest.raises(UserError) as error:
        load_config(f"{REPOSITORY / 'configs' / 'imagenet.py'}:{choice}")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
