import dataclasses
import json

import jax
import numpy as np
import pytest

from resnet_jax import planning
from resnet_jax.config import default_config, load_config, resolve
from resnet_jax.errors import UserError
from resnet_jax.planning.chips import CHIPS
from resnet_jax.planning.datasets import paper_dataset
from resnet_jax.planning.plan import IMAGES_PER_CORE, ring_bytes
from resnet_jax.planning.steps import trace_step, tree_bytes
from tests.conftest import REPOSITORY, make_console

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


def test_state_against_closed_forms():
    memory = planning.plan(tiny()).memory
    assert memory.parameters == 4 * RESNET8
    assert memory.optimizer == 4 * RESNET8  # a velocity
    assert memory.batch_statistics == 4 * 2 * (3 * 16 + 2 * 32 + 2 * 64)
    assert memory.ema == 0
    # 60,000 images and labels lie on the device, and a batch is its indices.
    assert memory.resident_data == 60_000 * (32 * 32 * 3 + 4)
    assert memory.input_batches == 4 * 32
    assert memory.total == sum(
        getattr(memory, name) for name in memory.__dataclass_fields__
    )


def test_averages_and_two_moments():
    config = tiny(
        optimizer__kind="lamb", optimizer__ema_decay=0.999, data__resident=False
    )
    memory = planning.plan(config, devices=4).memory
    assert memory.optimizer == 4 * (2 * RESNET8 + 1)  # and a count
    assert memory.ema == memory.parameters + memory.batch_statistics
    assert memory.resident_data == 0
    # The step's batch and the next one: uint8 images, int32 labels.
    assert memory.input_batches == 2 * 8 * (32 * 32 * 3 + 4)


def test_multiply_adds_of_a_step():
    plan = planning.plan(tiny(), devices=8)
    assert plan.images_per_device == 4
    stem = 32 * 32 * 16 * 27
    blocks = ((32 * 32 * 16, 2 * 16), (16 * 16 * 32, 16 + 32), (8 * 8 * 64, 32 + 64))
    convolutions = sum(outputs * 9 * channels for outputs, channels in blocks)
    assert plan.forward_multiply_adds == stem + convolutions + 64 * 10
    # Two products of each kind in the backward pass, but the images have no gradient.
    assert plan.step_multiply_adds == 3 * plan.forward_multiply_adds - stem


def test_resnet50_as_published():
    config = load_config(
        str(REPOSITORY / "configs/imagenet.py:resnet50,goyal2017"),
        {"model.dtype": "bfloat16"},
    )
    plan = planning.plan(config, devices=256, hosts=32, chips=["tpu_v5e"])
    assert plan.forward_multiply_adds == pytest.approx(4.09e9, rel=1e-3)
    stem = 112 * 112 * 64 * 147
    assert plan.step_multiply_adds == pytest.approx(
        3 * plan.forward_multiply_adds - stem, rel=1e-3
    )
    assert plan.gradient_bytes == 4 * 25_557_032
    assert (plan.images_per_device, plan.images_per_host) == (32, 256)
    assert plan.steps == -(-90 * 1_281_167 // 8_192)
    per_epoch = 1_281_167 / 8_192
    rates = {rate.step: rate.rate for rate in plan.learning_rates}
    warmup = int(np.ceil(5 * per_epoch))
    expected = {1: 0.1 + 3.1 / warmup, warmup: 3.2, plan.steps: 3.2e-3}
    for index, epoch in enumerate((30, 60, 80), 1):
        expected[int(np.ceil(epoch * per_epoch)) + 1] = 3.2 * 0.1**index
    assert rates == pytest.approx(expected, rel=1e-5)
    (chip,) = plan.chips
    assert chip.compute_seconds == pytest.approx(
        2 * plan.step_multiply_adds * 32 / 197e12
    )
    assert chip.traffic_seconds == pytest.approx(plan.step_bytes / 819e9)
    assert chip.step_seconds == max(chip.compute_seconds, chip.traffic_seconds)
    assert chip.images_per_second == pytest.approx(8_192 / chip.step_seconds)
    assert chip.host_cores == pytest.approx(
        chip.images_per_second / 32 / IMAGES_PER_CORE
    )
    assert chip.fits
    # Maps in two bytes: a convolution's result and the next one's operand, 11.1 M
    # each an image, are kept for the gradient.
    per_image = 2 * 2 * 11.1e6
    assert plan.memory.activations == pytest.approx(32 * per_image, rel=0.15)


def test_ring_against_a_simulation():
    devices, chunks = 5, 5
    values = np.random.default_rng(0).integers(0, 100, (devices, chunks))
    held, sent = values.copy(), 0
    for turn in range(2 * (devices - 1)):
        before = held.copy()
        for device in range(devices):
            # Chunks are added up on the first way around and handed on in the second.
            chunk = (device - turn) % chunks
            after = (device + 1) % devices
            adding = turn < devices - 1
            held[after, chunk] = before[device, chunk] + adding * before[after, chunk]
        sent += 1
    assert (held == values.sum(0)).all()
    assert ring_bytes(chunks, devices) == pytest.approx(sent)
    assert ring_bytes(100, 1) == 0


def test_efficiency_interconnect_and_rates_of_input():
    config = tiny(data__resident=False)
    options = {"devices": 8, "hosts": 2, "chips": ["h200_sxm"]}
    (bound,) = planning.plan(config, **options).chips
    plan = planning.plan(
        config,
        **options,
        efficiency=0.5,
        interconnect=0.1,
        images_per_core=100,
        mean_image_bytes=1000,
    )
    (chip,) = plan.chips
    assert chip.compute_seconds == 2 * bound.compute_seconds
    assert chip.traffic_seconds == 2 * bound.traffic_seconds
    sent = 2 * 7 / 8 * 4 * RESNET8
    assert chip.all_reduce_seconds == pytest.approx(sent / 0.05e9)
    assert chip.step_seconds == chip.all_reduce_seconds
    per_host = 32 / chip.step_seconds / 2
    assert chip.host_images_per_second == pytest.approx(per_host)
    assert chip.host_cores == pytest.approx(per_host / 100)
    assert chip.host_bytes_per_second == pytest.approx(1000 * per_host)


def test_what_does_not_fit():
    config = tiny(data__resident=False, training__global_batch_size=65_536)
    plan = planning.plan(config, chips=["tpu_v5e", "b200"])
    small, large = plan.chips
    assert small.memory_share == pytest.approx(plan.memory.total / 16e9)
    assert not small.fits
    assert large.fits
    console = make_console()
    planning.print_plan(console, plan)
    assert "no: the run does not fit" in console.file.getvalue()


def test_groups_of_statistics_are_shared_out():
    config = tiny(model__batch_norm_groups=8)
    dataset = paper_dataset(resolve(config))
    for devices, groups in ((1, 8), (4, 2), (8, 1), (16, 1)):
        step = trace_step(resolve(config), dataset, devices)
        assert step.setup.learner.model.batch_norm_groups == groups
    notes = planning.plan(config, devices=16).notes
    assert any("over 2 devices" in note for note in notes)


def test_accelerators_run_xlas_convolutions():
    config = resolve(tiny())
    step = trace_step(config, paper_dataset(config))
    assert step.setup.learner.model.conv_algorithm == "xla"
    explicit = resolve(tiny(model__conv_algorithm="products"))
    step = trace_step(explicit, paper_dataset(explicit))
    assert step.setup.learner.model.conv_algorithm == "products"


def test_sharded_arrays_count_with_their_part():
    mesh = jax.make_mesh((8,), ("data",))
    cut = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.ShapeDtypeStruct((16, 3), np.float32)
    part = jax.ShapeDtypeStruct((16, 3), np.float32, sharding=cut)
    assert tree_bytes([whole, part]) == 4 * (48 + 6)


def test_data_at_hand_come_before_the_table(image_folder):
    config = tiny(data__path=str(image_folder), training__global_batch_size=6)
    plan = planning.plan(config)
    assert plan.training_examples == 18
    config.data.path = str(image_folder / "missing")
    assert planning.plan(config).training_examples == 50_000


def test_parts_and_sizes_of_data_sets():
    config = tiny(data__train_split="train[:90%]", data__holdout_split="train[90%:]")
    assert planning.plan(config).training_examples == 45_000
    config = tiny(data__holdout_examples=5_000)
    assert planning.plan(config).training_examples == 45_000
    config = tiny(data__name="mine")
    plan = planning.plan(config, examples=640, classes=7, image_size=16)
    assert (plan.training_examples, plan.steps) == (640, 40)
    assert plan.memory.resident_data == 2 * 640 * (16 * 16 * 3 + 4)
    head = 64 * (10 - 7) + 3
    assert plan.memory.parameters == 4 * (RESNET8 - head)


def test_rates_around_a_warmup_by_the_error():
    config = load_config(str(REPOSITORY / "configs/cifar10.py:cifar_resnet110"))
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, name="cifar_resnet8")
    )
    plan = planning.plan(config, chips=["b200"])
    rates = {rate.step: rate.rate for rate in plan.learning_rates}
    expected = {1: 0.01, 32_001: 0.01, 48_001: 0.001, 64_000: 0.001}
    assert rates == pytest.approx(expected)
    assert any("below 0.8" in note for note in plan.notes)


def test_json_holds_it_all():
    plan = planning.plan(tiny(), chips=["b200"])
    content = json.loads(plan.to_json())
    assert content["memory"]["total"] == plan.memory.total
    assert content["chips"][0]["step_seconds"] == plan.chips[0].step_seconds
    assert content["learning_rates"][0]["step"] == 1


def test_chips_are_plausible():
    for chip in CHIPS.values():
        assert chip.source.startswith("https://")
        assert 0 < chip.float32_tflops <= chip.bfloat16_tflops
        # More operations a byte than any chip of the last years needs, or fewer.
        ratio = 1e3 * chip.bfloat16_tflops / chip.memory_gb_per_second
        assert 100 < ratio < 600


@pytest.mark.parametrize(
    ("overrides", "options", "sentence"),
    [
        ({}, {"devices": 5}, "does not divide over 5 devices.* 30 and 35"),
        ({}, {"devices": 8, "hosts": 3}, "8 devices do not divide over 3 hosts: give "
         "--devices 6 or 9"),
        ({}, {"devices": 0}, "at least 1"),
        ({}, {"chips": ["h200"]}, "unknown chip 'h200'; did you mean h200_sxm"),
        ({}, {"chips": ["A100"]}, "did you mean a100_40gb or a100_80gb"),
        ({}, {"chips": ["tpu_5e"]}, "did you mean tpu_v5e"),
        ({}, {"efficiency": 1.5}, "above 0 and at most 1, not 1.5"),
        ({}, {"images_per_core": 0}, "--images-per-core must be above 0"),
        ({"data__name": "mine"}, {}, "'mine' is not known without its data"),
        ({"data__name": "mine"}, {"examples": 9}, "give --classes and --image-size"),
        ({"data__name": "imagenet2012", "data__test_split": "val"}, {},
         "differ in size: set data.image_size"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_sentence(overrides, options, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        planning.plan(tiny(**overrides), **options)
    assert "\n" not in str(error.value)


def test_a_sharded_state_is_planned_cut_over_the_devices():
    file = str(REPOSITORY / "configs" / "imagenet.py:resnet50")
    whole, cut = (
        planning.plan(
            load_config(file, {"parallel.fully_sharded": text}), devices=8
        ).memory
        for text in ("false", "true")
    )
    # Leaves of under 4,096 elements stay whole.
    assert cut.parameters == pytest.approx(whole.parameters / 8, rel=0.05)
    assert cut.optimizer == pytest.approx(whole.optimizer / 8, rel=0.05)
    assert cut.activations - whole.activations == whole.parameters - cut.parameters
