"""Plans against closed forms."""

import dataclasses
import json

import numpy as np
import pytest

from resnet_jax.config import default_config, load_config
from resnet_jax.errors import UserError
from resnet_jax.plan import IMAGES_PER_CORE, plan
from resnet_jax.targets.chips import CHIPS
from tests.conftest import REPOSITORY

RESNET8 = 75_290  # parameters of cifar_resnet8 with three channels


def tiny(**overrides):
    config = default_config()
    config.model.name = "cifar_resnet8"
    config.data.name = "cifar10"
    config.training.epochs = 2
    config.training.global_batch_size = 32
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        config[section][key] = value
    return config


def test_the_state_against_closed_forms():
    run = plan(tiny())
    assert run.parameters == RESNET8
    memory = dict(run.memory)
    assert memory["parameters"] == memory["gradients"] == 4 * RESNET8
    assert memory["optimizer"] == 4 * RESNET8  # a velocity
    assert memory["batch statistics"] == 4 * 2 * (3 * 16 + 2 * 32 + 2 * 64)
    assert memory["moving averages"] == 0
    # The device holds 60,000 images and labels, and a batch is a list of indices.
    assert not run.streamed
    assert memory["resident data"] == 60_000 * (32 * 32 * 3 + 4)
    assert memory["batches"] == 4 * 32
    assert memory.pop("total") == sum(memory.values())


def test_averages_and_two_moments():
    config = tiny(
        optimizer__kind="lamb", optimizer__ema_decay=0.999, data__resident=False
    )
    memory = plan(config, devices=4).memory
    assert memory["optimizer"] == 4 * (2 * RESNET8 + 1)  # and a count
    assert (
        memory["moving averages"] == memory["parameters"] + memory["batch statistics"]
    )
    assert memory["resident data"] == 0
    # The step's batch and the next one: uint8 images, int32 labels.
    assert memory["batches"] == 2 * 8 * (32 * 32 * 3 + 4)


def test_a_sharded_state_is_cut_over_the_devices():
    file = str(REPOSITORY / "configs" / "imagenet.py:resnet50")
    whole, cut = (
        plan(load_config(file, {"parallel.fully_sharded": text}), devices=8).memory
        for text in ("false", "true")
    )
    # Leaves of under 4,096 elements stay whole.
    for part in ("parameters", "optimizer"):
        assert cut[part] == pytest.approx(whole[part] / 8, rel=0.05)


def test_work_of_a_step():
    run = plan(tiny(), devices=8)
    assert run.images_per_device == 4
    stem = 32 * 32 * 16 * 27
    blocks = ((32 * 32 * 16, 2 * 16), (16 * 16 * 32, 16 + 32), (8 * 8 * 64, 32 + 64))
    convolutions = sum(outputs * 9 * channels for outputs, channels in blocks)
    assert run.forward_multiply_adds == stem + convolutions + 64 * 10
    assert run.step_flops == 6 * 32 * run.forward_multiply_adds


def test_resnet50_as_published():
    config = load_config(
        str(REPOSITORY / "configs/imagenet.py:resnet50,goyal2017"),
        {"model.dtype": "bfloat16"},
    )
    run = plan(config, devices=256, hosts=32, chips=["tpu_v5e"], rate=64_000)
    assert run.forward_multiply_adds == pytest.approx(4.09e9, rel=1e-3)
    assert run.parameters == 25_557_032
    assert (run.images_per_device, run.images_per_host) == (32, 256)
    assert run.steps == -(-90 * 1_281_167 // 8_192)
    per_epoch = 1_281_167 / 8_192
    rates = {rate.step: rate.rate for rate in run.learning_rates}
    warmup = int(np.ceil(5 * per_epoch))
    expected = {1: 0.1 + 3.1 / warmup, warmup: 3.2, run.steps: 3.2e-3}
    for index, epoch in enumerate((30, 60, 80), 1):
        expected[int(np.ceil(epoch * per_epoch)) + 1] = 3.2 * 0.1**index
    assert rates == pytest.approx(expected, rel=1e-5)
    (chip,) = run.chips
    assert chip.step_seconds == pytest.approx(run.step_flops / 256 / 197e12)
    assert chip.images_per_second == pytest.approx(8_192 / chip.step_seconds)
    assert chip.host_cores == pytest.approx(
        chip.images_per_second / 32 / IMAGES_PER_CORE
    )
    assert (run.host_images_per_second, run.host_cores) == (2_000, 2_000 / 633)
    content = json.loads(run.to_json())
    assert content["chips"][0]["step_seconds"] == chip.step_seconds
    assert content["learning_rates"][0]["step"] == 1


def test_data_at_hand_come_before_the_table(image_folder):
    config = tiny(data__path=str(image_folder), training__global_batch_size=6)
    assert plan(config).training_examples == 18
    config.data.path = str(image_folder / "missing")
    assert plan(config).training_examples == 50_000


def test_parts_and_sizes_of_data_sets():
    config = tiny(data__train_split="train[:90%]", data__holdout_split="train[90%:]")
    assert plan(config).training_examples == 45_000
    config = tiny(data__holdout_examples=5_000)
    assert plan(config).training_examples == 45_000
    config = tiny(data__name="mine")
    run = plan(config, examples=640, classes=7, image_size=16)
    assert (run.training_examples, run.steps) == (640, 40)
    assert run.memory["resident data"] == 2 * 640 * (16 * 16 * 3 + 4)
    assert run.parameters == RESNET8 - (64 * (10 - 7) + 3)


def test_rates_around_a_warmup_by_the_error():
    config = load_config(str(REPOSITORY / "configs/cifar10.py:cifar_resnet110"))
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, name="cifar_resnet8")
    )
    run = plan(config, chips=["b200"])
    rates = {rate.step: rate.rate for rate in run.learning_rates}
    expected = {1: 0.01, 32_001: 0.01, 48_001: 0.001, 64_000: 0.001}
    assert rates == pytest.approx(expected)
    assert any("below 0.8" in note for note in run.notes)


def test_chips_are_plausible():
    for chip in CHIPS.values():
        assert chip.source.startswith("https://")
        assert 0 < chip.float32_tflops <= chip.bfloat16_tflops
        # Operations per byte at which arithmetic and memory take equally long.
        ratio = 1e3 * chip.bfloat16_tflops / chip.memory_gb_per_second
        assert 100 < ratio < 600


@pytest.mark.parametrize(
    ("overrides", "options", "sentence"),
    [
        ({}, {"devices": 5}, "does not divide over 5 devices.* 30 and 35"),
        ({}, {"devices": 8, "hosts": 3}, "--devices 6 or 9"),
        ({}, {"devices": -1}, "--devices must be from 1 to 1,000,000"),
        ({}, {"hosts": 10**30}, "--hosts must be from 1 to 1,000,000"),
        ({}, {"rate": float("inf")}, "--rate must be above 0 and up to"),
        ({}, {"chips": ["h200"]}, "unknown chip 'h200'; did you mean h200_sxm"),
        ({}, {"chips": ["A100"]}, "did you mean a100_40gb or a100_80gb"),
        ({}, {"chips": ["tpu_5e"]}, "did you mean tpu_v5e"),
        ({}, {"rate": 0}, "--rate must be above 0"),
        ({}, {"images_per_core": 0}, "--images-per-core must be above 0"),
        ({"data__name": "mine"}, {}, "'mine' .* --examples N --classes K --image-size"),
        ({"data__name": "mine"}, {"examples": 9}, "--classes K --image-size S"),
        ({"data__name": "imagenet2012", "data__test_split": "val"}, {},
         "or give --image-size S"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_in_one_sentence(overrides, options, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        plan(tiny(**overrides), **options)
    assert "\n" not in str(error.value)
