import cv2
import jax
import numpy as np
import pytest

from resnet_jax import parallel
from resnet_jax.config import default_config, resolve
from resnet_jax.data.batch import gather
from resnet_jax.data.dataset import open_dataset
from resnet_jax.data.feeds import ResidentFeed, StreamingFeed, make_feed
from resnet_jax.data.order import Order
from resnet_jax.data.sources import Subset
from resnet_jax.data.sources.arrays import ArraySource
from resnet_jax.data.split import Split
from resnet_jax.errors import UserError
from tests.conftest import write_image_folder

gather = jax.jit(gather)


def opened(root, **changes):
    config = default_config()
    config.training.steps = 1
    config.data.path = str(root)
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    config = resolve(config)
    return config, open_dataset(config)


def feed_of(root, split="train", **changes):
    config, dataset = opened(root, **changes)
    mesh = parallel.data_mesh(2)
    return make_feed(getattr(dataset, split), mesh, config.data, config.augmentation)


def drawn(batches, resident, count):
    pairs = [gather(resident, batch) for _, batch in zip(range(count), batches)]
    return (
        np.concatenate([np.asarray(images) for images, _ in pairs]),
        np.concatenate([np.asarray(labels) for _, labels in pairs]),
    )


def all_examples(root, split):
    """Read here by OpenCV alone, in the order of classes and file names."""
    files = sorted((root / split).rglob("*.png"))
    images = np.stack([cv2.imread(str(file))[..., ::-1] for file in files])
    classes = sorted({file.parent.name for file in files})
    return images, np.array([classes.index(file.parent.name) for file in files])


@pytest.mark.parametrize("resident", [True, False])
def test_training_batches_follow_the_order(image_folder, resident):
    feed = feed_of(image_folder, data__resident=resident)
    assert isinstance(feed, ResidentFeed if resident else StreamingFeed)
    images, labels = all_examples(image_folder, "train")
    position = 32  # within the second epoch of 18, and the batches enter the third
    got = drawn(feed.training_batches(position, 4, seed=3), feed.resident, 3)
    expected = Order(18, seed=3).examples(position, 12)
    np.testing.assert_array_equal(got[0], images[expected])
    np.testing.assert_array_equal(got[1], labels[expected])


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("batch_size", [2, 4, 6, 20])
def test_evaluation_counts_every_example_once(image_folder, resident, batch_size):
    feed = feed_of(image_folder, "test", data__resident=resident)
    images, labels = all_examples(image_folder, "test")
    batches = list(feed.evaluation_batches(batch_size))
    got = drawn(iter(batches), feed.resident, len(batches))
    mask = np.concatenate([np.asarray(batch["mask"]) for batch in batches]) > 0
    np.testing.assert_array_equal(got[0][mask], images)
    np.testing.assert_array_equal(got[1][mask], labels)


def test_batches_lie_over_the_devices(image_folder):
    feed = feed_of(image_folder, data__resident=False)
    batch = next(iter(feed.training_batches(0, 4, seed=0)))
    assert {shard.data.shape[0] for shard in batch["image"].addressable_shards} == {2}


def test_random_crops_depend_on_seed_and_position_alone(image_folder):
    changes = {
        "data__image_size": 8,
        "augmentation__shorter_side": (8, 16),
    }
    one = feed_of(image_folder, data__num_threads=1, **changes)
    many = feed_of(image_folder, data__num_threads=8, **changes)
    first = drawn(one.training_batches(0, 4, seed=1), None, 6)[0]
    resumed = drawn(many.training_batches(12, 4, seed=1), None, 3)[0]
    np.testing.assert_array_equal(first[12:], resumed)
    other = drawn(one.training_batches(0, 4, seed=2), None, 1)[0]
    assert not np.array_equal(first[:4], other)


def test_a_broken_image_stops_the_feed_by_its_name(image_folder):
    (image_folder / "train" / "bee" / "3.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"bee/3\.png cannot be decoded"):
        feed_of(image_folder)
    feed = feed_of(image_folder, data__resident=False)
    with pytest.raises(UserError, match=r"bee/3\.png cannot be decoded"):
        drawn(feed.training_batches(0, 18, seed=0), None, 1)


def test_small_sets_are_resident_and_large_ones_are_not(image_folder):
    assert feed_of(image_folder).resident is not None
    assert feed_of(image_folder, data__resident_mib=0).resident is None


def test_per_pixel_mean_is_of_the_training_images(image_folder):
    _, dataset = opened(image_folder)
    images, _ = all_examples(image_folder, "train")
    statistics = dataset.train.statistics()
    np.testing.assert_allclose(statistics.mean, (images / 255).mean(0), atol=1e-6)
    np.testing.assert_array_equal(statistics.std, np.ones((10, 12, 3)))


def test_per_channel_statistics(image_folder):
    _, dataset = opened(image_folder, data__normalization="per_channel")
    images, _ = all_examples(image_folder, "train")
    statistics = dataset.train.statistics()
    np.testing.assert_allclose(
        statistics.mean[0, 0], (images / 255).mean((0, 1, 2)), atol=1e-6
    )
    np.testing.assert_allclose(
        statistics.std[0, 0], (images / 255).std((0, 1, 2)), atol=1e-6
    )


def test_the_held_out_part_is_never_trained_on(image_folder):
    _, dataset = opened(image_folder, data__holdout_examples=5)
    assert (len(dataset.train), len(dataset.holdout), len(dataset.test)) == (13, 5, 6)
    parts = [
        {split.example(i)[0].tobytes() for i in range(len(split))}
        for split in (dataset.train, dataset.holdout)
    ]
    assert not parts[0] & parts[1]
    images, _ = all_examples(image_folder, "train")
    assert parts[0] | parts[1] == {image.tobytes() for image in images}


def test_sizes_that_differ_ask_for_an_image_size(tmp_path):
    root = write_image_folder(tmp_path, {"train": 2, "test": 1})
    cv2.imwrite(
        str(root / "train" / "cat" / "big.png"), np.zeros((20, 20, 3), np.uint8)
    )
    with pytest.raises(UserError, match=r"big\.png is 20x20 and the first is 12x10"):
        feed_of(root)
    feed = feed_of(root, data__image_size=8)
    assert feed.resident["image"].shape == (7, 8, 8, 3)


def test_a_holdout_larger_than_the_set_is_refused(image_folder):
    with pytest.raises(UserError, match=r"leaves nothing of the 18"):
        opened(image_folder, data__holdout_examples=18)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("augmentation__color_noise", 0.1),
        ("augmentation__color_jitter", (0.4, 0.4, 0.4)),
        ("data__normalization", "imagenet"),
    ],
)
def test_colours_of_grey_images_are_refused(tfds_dir, name, value):
    config = default_config()
    config.training.steps = 1
    config.data.data_dir = tfds_dir
    section, key = name.split("__")
    config[section][key] = value
    with pytest.raises(UserError, match=r"needs colour images"):
        open_dataset(resolve(config))


def test_training_and_evaluation_may_differ_in_size(image_folder):
    changes = {
        "data__image_size": 8,
        "data__eval_image_size": 10,
        "data__eval_shorter_side": 11,
        "data__normalization": "per_channel",
        "augmentation__crop_area": (0.3, 1.0),
    }
    train = feed_of(image_folder, **changes)
    images, _ = drawn(train.training_batches(0, 4, seed=0), train.resident, 1)
    assert images.shape == (4, 8, 8, 3)
    test = feed_of(image_folder, "test", **changes)
    images, _ = drawn(test.evaluation_batches(4), test.resident, 1)
    assert images.shape == (4, 10, 10, 3)
    # The training split as evaluation sees it too, for `evaluate --split train`.
    images, _ = drawn(train.evaluation_batches(4), train.resident, 1)
    assert images.shape == (4, 10, 10, 3)


@pytest.mark.parametrize("resident", [True, False])
def test_an_incomplete_batch_may_be_dropped(image_folder, resident):
    feed = feed_of(image_folder, data__resident=resident, data__partial_batch="drop")
    images, labels = all_examples(image_folder, "train")
    got = drawn(feed.training_batches(0, 8, seed=3), feed.resident, 4)
    # Of 18 examples an epoch has two batches of 8.
    expected = np.concatenate(
        [Order(18, seed=3).examples(epoch * 18, 16) for epoch in range(2)]
    )
    np.testing.assert_array_equal(got[0], images[expected])
    np.testing.assert_array_equal(got[1], labels[expected])


@pytest.mark.parametrize("resident", [True, False])
def test_broken_images_are_skipped_and_told(image_folder, resident):
    (image_folder / "test" / "bee" / "0.png").write_bytes(b"broken")
    (image_folder / "train" / "bee" / "3.png").write_bytes(b"broken")
    changes = {"data__on_error": "skip", "data__resident": resident}
    feed = feed_of(image_folder, "test", **changes)
    batches = list(feed.evaluation_batches(4))
    counted = sum(float(np.asarray(batch["mask"]).sum()) for batch in batches)
    assert counted == 5
    assert "bee/0.png cannot be decoded" in feed.skipped[0]
    train = feed_of(image_folder, **changes)
    images, labels = drawn(train.training_batches(0, 18, seed=0), train.resident, 1)
    assert len(train.skipped) == 1
    # Another image stands in for it, with that image's label.
    expected, classes = [], {}
    for file in sorted((image_folder / "train").rglob("*.png")):
        pixels = cv2.imread(str(file))
        if pixels is not None:
            expected.append(pixels[..., ::-1].tobytes())
            classes[expected[-1]] = sorted(["ant", "bee", "cat"]).index(
                file.parent.name
            )
    for image, label in zip(images, labels):
        assert classes[image.tobytes()] == label


def test_arrays_in_memory_are_streamed_as_they_are():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    labels = rng.integers(0, 5, 10)
    source = Subset(ArraySource(images, labels, "abcde", "here"), np.arange(2, 10))
    config = default_config()
    config.training.steps = 1
    config.data.resident = False
    config.data.partial_batch = "drop"
    config = resolve(config)
    split = Split("train", source, config.data)
    feed = make_feed(split, parallel.data_mesh(1), config.data, config.augmentation)
    got = drawn(feed.training_batches(0, 3, seed=1), None, 2)
    expected = 2 + Order(8, seed=1).examples(0, 6)
    np.testing.assert_array_equal(got[0], images[expected])
    np.testing.assert_array_equal(got[1], labels[expected])
