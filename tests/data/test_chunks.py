import contextlib
import dataclasses
import pickle
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from resnet_jax.config import default_config, resolve
from resnet_jax.config.schema import DataConfig
from resnet_jax.data.chunks import EvaluationChunks, Layout, TrainingChunks, join
from resnet_jax.data.dataset import open_dataset
from resnet_jax.data.feeds import host_batches, training_order
from resnet_jax.errors import UserError
from tests.conftest import REPOSITORY


def config_of(root, **changes):
    config = default_config()
    config.training.steps = 1
    config.data.path = str(root)
    config.data.image_size = 8
    config.augmentation.crop_area = (0.3, 1.0)
    config.augmentation.flip = True
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return resolve(config)


def training_chunks(
    config, position=0, batch_size=12, seed=1, host=0, num_hosts=1, chunk_size=None
):
    split = open_dataset(config).train
    layout = Layout.of(batch_size, 8 * 8 * 3, host, num_hosts)
    if chunk_size is not None:
        layout = Layout(batch_size, host, num_hosts, chunk_size)
    order = training_order(
        len(split), seed, batch_size, config.data, config.augmentation
    )
    skips = config.data.on_error == "skip"
    return TrainingChunks(split, config.augmentation, order, position, layout, skips)


def batches_of(config, count, **options):
    chunks = training_chunks(config, **options)
    stream = host_batches(chunks, config.data, count)
    return list(stream)


def images_of(batches):
    return np.concatenate([batch["image"] for batch in batches])


@pytest.mark.parametrize(
    ("batch_size", "num_hosts", "nbytes", "sizes"),
    [
        (256, 1, 224 * 224 * 3, [64] * 4),
        (100, 1, 224 * 224 * 3, [50, 50]),
        (8, 4, 224 * 224 * 3, [2]),
        (10, 1, 8 * 2**20, [2] * 5),
        (7, 1, 6 * 2**20, [2, 2, 2, 1]),
        (3, 1, 64 * 2**20, [1, 1, 1]),
    ],
)
def test_layouts_cover_every_place_once(batch_size, num_hosts, nbytes, sizes):
    places = []
    for host in range(num_hosts):
        layout = Layout.of(batch_size, nbytes, host, num_hosts)
        own = [layout.places(k) for k in range(2 * layout.chunks_per_batch)]
        assert [len(chunk) for chunk in own] == sizes * 2
        places += [place for chunk in own for place in chunk]
    assert sorted(places) == list(range(2 * batch_size))


def test_hosts_that_cannot_share_a_batch_are_refused():
    with pytest.raises(UserError, match="batch of 10 is not divisible by 4 hosts"):
        Layout.of(10, 1, 0, 4)


def test_hosts_threads_and_chunks_change_no_pixel(image_folder):
    config = config_of(image_folder)
    whole = images_of(batches_of(config, 4))
    assert whole.shape == (48, 8, 8, 3)
    few = config_of(image_folder, data__num_threads=1, data__prefetch_batches=1)
    np.testing.assert_array_equal(images_of(batches_of(few, 4, chunk_size=5)), whole)
    for num_hosts in (2, 3):
        parts = [
            np.stack([batch["image"] for batch in batches_of(config, 4, **hosts)])
            for hosts in (
                {"host": host, "num_hosts": num_hosts} for host in range(num_hosts)
            )
        ]
        np.testing.assert_array_equal(
            np.concatenate(parts, axis=1).reshape(whole.shape), whole
        )


def test_any_position_is_had_at_once(image_folder):
    config = config_of(image_folder)
    whole = images_of(batches_of(config, 4))
    rest = images_of(batches_of(config, 2, position=24))
    np.testing.assert_array_equal(rest, whole[24:])
    # Another batch size goes on from the same example too.
    other = images_of(batches_of(config, 3, position=24, batch_size=8))
    np.testing.assert_array_equal(other, whole[24:])


def test_processes_make_the_same_batches(image_folder):
    config = config_of(image_folder, data__num_processes=2, data__num_threads=2)
    one = batches_of(config_of(image_folder), 3, chunk_size=3)
    many = batches_of(config, 3, chunk_size=3)
    np.testing.assert_array_equal(images_of(many), images_of(one))
    for left, right in zip(many, one, strict=True):
        np.testing.assert_array_equal(left["label"], right["label"])


def test_crops_and_flips_change_from_epoch_to_epoch(image_folder):
    config = config_of(image_folder)
    order = training_order(18, 1, 18, config.data, config.augmentation)
    first, second = batches_of(config, 2, batch_size=18)
    same = order.examples(0, 18).argsort(), order.examples(18, 18).argsort()
    np.testing.assert_array_equal(first["label"][same[0]], second["label"][same[1]])
    differ = first["image"][same[0]] != second["image"][same[1]]
    assert differ.any(axis=(1, 2, 3)).mean() > 0.8


def test_flips_are_of_half_the_images(tmp_path):
    ramp = np.tile(np.arange(0, 256, 8, np.uint8), (32, 1))
    for split in ("train", "test"):
        folder = tmp_path / split / "ramp"
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder / "ramp.png"), ramp)
    changes = {"augmentation__crop_area": (1.0, 1.0)}
    flipped = images_of(batches_of(config_of(tmp_path, **changes), 1, batch_size=400))
    mirrored = (flipped[:, 4, 0, 0] > flipped[:, 4, -1, 0]).mean()
    assert 0.4 < mirrored < 0.6
    without = config_of(tmp_path, augmentation__flip=False, **changes)
    kept = images_of(batches_of(without, 1, batch_size=50))
    assert (kept[:, 4, 0, 0] < kept[:, 4, -1, 0]).all()


def test_a_broken_image_stops_by_its_name(image_folder):
    (image_folder / "train" / "bee" / "3.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"bee/3\.png cannot be decoded"):
        batches_of(config_of(image_folder), 2)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_broken_image_is_replaced_counted_and_told(image_folder, processes):
    config = config_of(image_folder, data__on_error="skip")
    whole = batches_of(config, 3)
    assert not any(batch["skipped"] for batch in whole)
    (image_folder / "train" / "bee" / "3.png").write_bytes(b"broken")
    data = dataclasses.replace(config.data, num_processes=processes)
    read = dataclasses.replace(config, data=data)
    batches = batches_of(read, 3)  # two epochs of 18
    told = [line for batch in batches for line in batch["skipped"].splitlines()]
    assert len(told) == 2
    assert all("bee/3.png cannot be decoded" in line for line in told)
    changed = (images_of(batches) != images_of(whole)).any(axis=(1, 2, 3))
    assert changed.sum() == 2
    # The other images are as before, and the replacement comes again.
    np.testing.assert_array_equal(images_of(batches_of(config, 3)), images_of(batches))


def test_a_data_set_of_broken_images_stops_even_where_they_are_skipped(image_folder):
    for file in (image_folder / "train").rglob("*.png"):
        file.write_bytes(b"broken")
    config = config_of(image_folder, data__on_error="skip")
    with pytest.raises(UserError, match="100 replacements are broken too"):
        batches_of(config, 1)


def test_evaluation_pads_masks_and_leaves_broken_images_out(image_folder):
    config = config_of(image_folder, data__on_error="skip")
    (image_folder / "test" / "bee" / "0.png").write_bytes(b"")
    split = open_dataset(config).test
    chunks = EvaluationChunks(split, Layout(4, 0, 1, 3), skips=True)
    batches = list(host_batches(chunks, config.data, 2))
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert mask.sum() == len(split) - 1
    assert not mask[len(split) :].any()
    broken = [i for i in range(len(split)) if not mask[i]]
    labels = np.concatenate([batch["label"] for batch in batches])
    images = images_of(batches)
    for index in set(range(len(split))) - set(broken):
        image, label = split.example(index)
        np.testing.assert_array_equal(images[index], image)
        assert labels[index] == label


def test_joining_keeps_the_first_error():
    whole = {"image": np.zeros((1, 2)), "skipped": ""}
    assert join([whole, {"error": "a"}, {"error": "b"}]) == {"error": "a"}


def test_a_worker_that_dies_stops_the_run_with_its_cause(image_folder, monkeypatch):
    config = config_of(image_folder, data__num_processes=1)
    with pytest.raises(UserError, match=r"reads the data died.*exit code 3"):
        list(host_batches(_Dying(Layout(2, 0, 1, 2)), config.data, 50))


class _Dying:
    """Chunks whose reading ends the process, as a fault in a library would."""

    def __init__(self, layout):
        self.layout = layout

    def __call__(self, number):
        import os

        if number == 5:
            os._exit(3)
        return {"image": np.zeros((2, 1, 1, 1), np.uint8), "skipped": ""}


def test_workers_end_with_a_run_that_was_killed():
    code = "from tests.data.test_chunks import print_worker; print_worker()"
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=REPOSITORY, text=True
    )
    worker = Path("/proc") / run.stdout.readline().strip()
    assert worker.exists()
    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    with contextlib.suppress(FileNotFoundError):
        while (worker / "stat").read_text().split()[2] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.1)


def print_worker():
    """Prints the number of a worker process, and waits to be killed."""
    data = DataConfig(num_processes=1)
    batches = host_batches(_Numbered(Layout(2, 0, 1, 2)), data)
    print(int(next(batches)["image"][0, 0]), flush=True)
    time.sleep(60)


class _Numbered:
    """Chunks that hold the number of the process that reads them."""

    def __init__(self, layout):
        self.layout = layout

    def __call__(self, number):
        import os

        return {"image": np.full((2, 1), os.getpid()), "skipped": ""}


def test_chunks_pickle_small(image_folder):
    # They are sent to every worker process.
    assert len(pickle.dumps(training_chunks(config_of(image_folder)))) < 20_000
