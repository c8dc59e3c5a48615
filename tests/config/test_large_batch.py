"""configs/imagenet_large_batch.py, by the numbers of its sources.

lars32768: arXiv:1709.05011; of tensorflow/tpu's models/official/resnet, lars_util.py
(rate, warm-up, power), configs/ (decay, momentum, smoothing), resnet_preprocessing.py.
"""

import jax.numpy as jnp
import pytest

from resnet_jax.config import derive, flatten, load_config
from resnet_jax.config.files import config_file
from resnet_jax.errors import UserError
from resnet_jax.training.schedule import Schedule
from tests.conftest import REPOSITORY

FILE = REPOSITORY / "configs" / "imagenet_large_batch.py"
TRAINING_IMAGES = 1_281_167


def recipe(name, overrides=None):
    return load_config(f"{FILE}:{name}", overrides)


def test_goyal8192_is_the_frozen_recipe_and_the_default():
    frozen = load_config(str(REPOSITORY / "configs/recipes/goyal2017.py") + ":resnet50")
    assert recipe("goyal8192") == frozen == load_config(str(FILE))


def test_lars32768_has_the_numbers_of_its_sources():
    expected = {
        "model.name": "resnet50",
        "model.zero_init_last": True,
        "data.image_size": 224,
        "data.eval_shorter_side": 256,  # 224 / 256 of the shorter side
        "data.eval_interpolation": "bicubic",
        "data.normalization": "imagenet",
        "augmentation.crop_area": (0.08, 1.0),
        "augmentation.crop_aspect": (3 / 4, 4 / 3),
        "augmentation.flip": True,
        "augmentation.policy": None,
        "loss.kind": "softmax",
        "loss.label_smoothing": 0.1,
        "optimizer.kind": "lars",
        "optimizer.learning_rate": 32.0,
        "optimizer.trust_coefficient": 0.001,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": False,
        "optimizer.weight_decay": 1e-4,
        "optimizer.weight_decay_scope": "kernels",  # not biases, not normalisation
        "optimizer.max_grad_norm": None,
        "schedule.kind": "polynomial",
        "schedule.power": 2.0,
        "schedule.final_learning_rate": 0.0,
        "schedule.warmup_epochs": 14.0,
        "schedule.warmup_initial_learning_rate": 0.0,
        "training.epochs": 90.0,
        "training.global_batch_size": 32_768,
    }
    found = flatten(recipe("lars32768"))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "per_epoch", "steps", "rates"),
    [
        (
            "goyal8192",
            156.39,
            14_076,  # 90 x 156.39, rounded up; a warm-up of 782
            {
                0: 0.1 + 3.1 / 782,  # from 0.1, a 782th of the way
                390: 0.1 + 3.1 / 2,
                781: 3.2,  # 0.1 x 8192 / 256
                4_691: 3.2,
                4_692: 0.32,
                9_384: 0.032,
                14_075: 0.0032,
            },
        ),
        (
            "lars32768",
            39.098,
            3_519,  # a warm-up of 548, 2,971 steps after it
            {
                0: 32 / 548,
                273: 16.0,
                548: 32.0,
                548 + 743: 32 * (1 - 743 / 2_971) ** 2,
                3_518: 32 / 2_971**2,
                3_519: 0.0,
            },
        ),
    ],
)
def test_steps_and_rates(name, per_epoch, steps, rates):
    config = recipe(name)
    derived = derive(config, TRAINING_IMAGES)
    assert derived.steps_per_epoch == pytest.approx(per_epoch, rel=1e-4)
    assert derived.steps == steps
    schedule = Schedule(config.optimizer, config.schedule, derived)
    for step, rate in rates.items():
        found = float(schedule.rate(schedule.init(), jnp.int32(step)))
        # The last step's share is 1 - 2970 / 2971, of which float32 keeps 4 digits.
        tolerance = 5e-3 if step == 3_518 else 1e-5
        assert found == pytest.approx(rate, rel=tolerance, abs=1e-9), step


@pytest.mark.parametrize(("name", "batch"), [("goyal8192", 8192), ("lars32768", 32768)])
def test_statistics_are_of_32_images_or_of_the_whole_batch(name, batch):
    assert recipe(name).model.batch_norm_groups * 32 == batch
    # The overrides that the file's docstring gives.
    documentation = FILE.read_text()
    for override in (
        "model.batch_norm_groups=1",
        "evaluation.precise_statistics_examples=65536",
    ):
        assert f"--config.{override}" in documentation
        field, value = override.split("=")
        assert flatten(recipe(name, {field: value}))[field] == int(value)


def test_the_numbers_of_mlperf_resolve():
    overrides = {
        "optimizer.learning_rate": "31.2",
        "schedule.warmup_epochs": "25",
        "schedule.final_learning_rate": "1e-4",
    }
    documentation = FILE.read_text()
    for field, value in overrides.items():
        assert f"--config.{field}={value}" in documentation
    config = recipe("lars32768", overrides)
    derived = derive(config, TRAINING_IMAGES)
    schedule = Schedule(config.optimizer, config.schedule, derived)
    assert derived.warmup_steps == 978  # 25 x 39.098, rounded up
    last = float(schedule.rate(schedule.init(), jnp.int32(derived.steps)))
    assert last == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("lars3276", "did you mean lars32768?"), ("x", "valid are goyal8192, lars32768")],
)
def test_other_recipes_are_refused(name, hint):
    with pytest.raises(UserError) as error:
        recipe(name)
    sentence = f"there is no large-batch recipe {name!r}; {hint}"
    assert str(error.value).endswith(sentence)


def test_the_documentation_names_both():
    _, documentation = config_file("imagenet_large_batch")
    table = (REPOSITORY / "docs" / "recipes.md").read_text()
    assert "goyal8192" in documentation
    for text in (documentation, table):
        assert "imagenet_large_batch:lars32768" in text
