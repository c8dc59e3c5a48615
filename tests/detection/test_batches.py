import dataclasses
import functools

import jax
import numpy as np
import pytest

from resnet_jax import parallel
from resnet_jax.config.detection import DetectionDataConfig
from resnet_jax.data.chunks import Layout, join
from resnet_jax.detection import batches
from resnet_jax.detection.batches import (
    BucketOrder,
    PreparedImages,
    TrainingChunks,
    bucket_shapes,
    evaluation_batches,
    pad_boxes,
    resized_size,
    steps_per_epoch,
    training_batches,
)
from resnet_jax.detection.sources.coco import open_coco
from resnet_jax.detection.sources.voc import open_voc
from resnet_jax.errors import UserError
from tests.detection.layouts import (
    coco_content,
    found_box,
    write_coco,
    write_instances,
    write_voc,
)

DATA = DetectionDataConfig(shorter_side=48, longer_side=80)
MESH = functools.cache(lambda: parallel.data_mesh(1))
IMAGES = {
    # Enlarged; reduced by the longer side; portrait; square, a box at the border.
    "wide": (30, 20, [("a", (9, 4, 24, 16))]),
    "long": (120, 60, [("b", (30, 12, 60, 48))]),
    "tall": (24, 36, [("a", (6, 12, 18, 30))]),
    "square": (40, 40, [("b", (0, 0, 10, 40))]),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc")
    return open_voc(write_voc(root, "train", IMAGES), "train")


@pytest.mark.parametrize(
    ("size", "sides", "expected"),
    [
        ((375, 500), (600, 1000), (600, 800)),
        ((500, 375), (600, 1000), (800, 600)),
        ((333, 500), (600, 1000), (600, 901)),
        ((250, 500), (600, 1000), (500, 1000)),
        ((1200, 1200), (600, 1000), (600, 600)),
        ((1, 5000), (600, 1000), (1, 1000)),
        ((600, 1001), (600, 1000), (599, 1000)),
    ],
)
def test_sizes_follow_both_sides(size, sides, expected):
    assert resized_size(size, *sides) == expected


def test_buckets_are_whole_strides():
    assert bucket_shapes(DetectionDataConfig()) == ((608, 1008), (1008, 608))
    assert bucket_shapes(DATA) == ((48, 80), (80, 48))


def test_evaluation_has_each_image_once_and_boxes_fit_the_pictures(source):
    seen = []
    for batch in evaluation_batches(source, DATA, 2, mesh=MESH()):
        batch = jax.tree.map(np.asarray, batch)
        assert batch["images"].dtype == np.uint8
        assert batch["images"].shape[1:3] in bucket_shapes(DATA)
        for row, index in enumerate(batch["index"]):
            if index < 0:
                assert not batch["images"][row].any()
                assert (batch["classes"][row] == -1).all()
                continue
            seen.append(int(index))
            annotation = source.annotation(int(index))
            size = batch["sizes"][row]
            np.testing.assert_allclose(size / annotation.size, batch["scales"][row])
            assert not batch["images"][row, size[0] :].any()
            assert not batch["images"][row, :, size[1] :].any()
            box = batch["boxes"][row, 0]
            np.testing.assert_allclose(found_box(batch["images"][row]), box, atol=0.51)
            original = box / np.tile(batch["scales"][row][::-1], 2)
            np.testing.assert_allclose(original, annotation.boxes[0], rtol=1e-6)
    assert seen == [0, 1, 3, 2]


def test_flips_mirror_boxes_and_pictures(source):
    flips = 0
    made = training_batches(source, DATA, 1, seed=3, mesh=MESH())
    plain = training_batches(source, DATA, 1, seed=3, mesh=MESH(), flip=False)
    for _, batch, other in zip(range(16), made, plain, strict=False):
        box, before = (np.asarray(each["boxes"])[0, 0] for each in (batch, other))
        width = int(batch["sizes"][0, 1])
        mirrored = [width - before[2], before[1], width - before[0], before[3]]
        flipped = not np.array_equal(box, before)
        np.testing.assert_allclose(box, mirrored if flipped else before, atol=1e-4)
        np.testing.assert_allclose(found_box(batch["images"][0]), box, atol=0.51)
        flips += flipped
    assert 3 < flips < 13
    made.close(), plain.close()


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 10), (3, 4), (4, 3), (16, 2)])
def test_an_epoch_has_every_image(batch_size, steps):
    buckets = np.array([0, 1, 0, 0, 0, 1, 0, 0, 1, 0])
    order = BucketOrder(buckets, batch_size, seed=7)
    assert order.epoch_steps == steps
    epochs = []
    for epoch in range(3):
        first = epoch * order.epoch_steps
        made = [order.batch(first + step) for step in range(order.epoch_steps)]
        assert all(len(set(buckets[each])) == 1 for each in made)
        assert set(np.concatenate(made)) == set(range(10))
        # Nothing repeats but what fills the last batch of a bucket.
        for bucket in (0, 1):
            drawn = np.concatenate([b for b in made if buckets[b[0]] == bucket])
            members = (buckets == bucket).sum()
            assert len(set(drawn[:members])) == members
            np.testing.assert_array_equal(drawn, np.resize(drawn[:members], len(drawn)))
        epochs.append(np.concatenate(made).tolist())
    assert epochs[0] != epochs[1] != epochs[2]
    again = BucketOrder(buckets, batch_size, seed=7)
    np.testing.assert_array_equal(again.batch(steps + 1), order.batch(steps + 1))


def test_batches_come_as_they_fill():
    buckets = np.array([0] * 40 + [1] * 40)
    order = BucketOrder(buckets, 4, seed=0)
    kinds = [buckets[order.batch(step)[0]] for step in range(20)]
    assert 0 < sum(kinds[:10]) < 10


def training_chunks(source, hosts, host, first_step, batch_size=4):
    prepared = PreparedImages(source, DATA)
    order = BucketOrder(prepared.buckets, batch_size, 5)
    layout = Layout.of(batch_size, 48 * 80 * 3, host, hosts)
    return TrainingChunks(prepared, order, first_step, layout, flip=True, skips=False)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("hosts", [2, 4])
def test_batches_are_the_same_for_any_number_of_processes(source, hosts):
    for step in range(4):
        whole = training_chunks(source, 1, 0, 0)(step)
        assert whole["index"].tolist() == list(range(4 * step, 4 * step + 4))
        parts = [training_chunks(source, hosts, h, 0)(step) for h in range(hosts)]
        assert_equal(join(parts), whole)


def test_batches_are_the_same_from_any_step_on(source):
    made = training_batches(source, DATA, 2, seed=9, mesh=MESH())
    expected = [next(made) for _ in range(7)]
    made.close()
    for first in (0, 3, 6):
        later = training_batches(source, DATA, 2, 9, first, mesh=MESH())
        assert_equal(next(later), expected[first])
        later.close()


def test_batches_are_split_over_the_devices(source):
    mesh = parallel.data_mesh(4)
    batch = next(training_batches(source, DATA, 4, seed=0, mesh=mesh))
    assert len(batch["images"].sharding.device_set) == 4
    assert batch["boxes"].sharding.is_equivalent_to(parallel.batch_sharding(mesh), 3)


def test_steps_per_epoch(source):
    assert steps_per_epoch(source, DATA, 2) == 3


def test_there_is_room_for_the_most_boxes_and_for_none(tmp_path):
    many = {
        "a": (20, 20, [("x", (i, i, i + 2, i + 2)) for i in range(9)]),
        "b": (20, 20, [("x", (1, 1, 3, 3), 1)]),
        "c": (20, 20, []),
    }
    source = open_voc(write_voc(tmp_path, "train", many), "train")

    def counts(difficult):
        data = dataclasses.replace(DATA, difficult=difficult)
        batch = next(evaluation_batches(source, data, 3, mesh=MESH()))
        assert batch["boxes"].shape == (3, 9, 4)
        return (np.asarray(batch["classes"]) == 0).sum(1).tolist()

    assert counts("use") == [9, 1, 0]
    assert counts("skip") == [9, 0, 0]


def test_crowds_are_left_out_and_boxes_are_clipped(tmp_path):
    images = {"a.png": (40, 40, [("x", (0, 0, 9, 9)), ("x", (5, 5, 9, 9))])}
    write_coco(tmp_path, "train", images, {1: "x"})
    content = coco_content(images, {1: "x"})
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][1]["bbox"] = [-4, 20, 60, 10]
    write_instances(tmp_path, "train", content)
    batch = next(evaluation_batches(open_coco(tmp_path, "train"), DATA, 1, mesh=MESH()))
    np.testing.assert_allclose(batch["boxes"], [[[0, 24, 48, 36]]])


def test_more_boxes_than_room_are_refused():
    boxes, classes = np.ones((3, 4), np.float32), np.arange(3, dtype=np.int32)
    padded = pad_boxes(boxes, classes, 5)
    assert padded[0].shape == (5, 4)
    assert padded[1].tolist() == [0, 1, 2, -1, -1]
    with pytest.raises(UserError, match="an image has 3 boxes, more than the 2"):
        pad_boxes(boxes, classes, 2)


@pytest.fixture
def broken(tmp_path):
    images = IMAGES | {"bad": (30, 20, [])}
    root = write_voc(tmp_path, "train", images)
    (root / "JPEGImages" / "bad.png").write_bytes(b"GIF89a")
    return open_voc(root, "train")


def test_a_broken_image_stops_or_is_replaced(broken):
    with pytest.raises(UserError, match="image bad cannot be decoded"):
        list(zip(range(5), training_batches(broken, DATA, 1, 0, mesh=MESH())))
    with pytest.raises(UserError, match="image bad cannot be decoded"):
        list(evaluation_batches(broken, DATA, 2, mesh=MESH()))
    skips = dataclasses.replace(DATA, on_error="skip")
    skipped: list[str] = []
    made = training_batches(broken, skips, 1, 0, mesh=MESH(), skipped=skipped)
    for _, batch in zip(range(5), made, strict=False):
        assert np.asarray(batch["images"]).any()
    assert len(skipped) >= 1
    assert "image bad" in skipped[0]
    skipped = []
    evaluated = evaluation_batches(broken, skips, 2, mesh=MESH(), skipped=skipped)
    found = np.concatenate([batch["index"] for batch in evaluated])
    assert sorted(found[found >= 0]) == [0, 1, 2, 3]
    assert len(skipped) == 1


def test_when_all_are_broken_the_run_stops(broken, monkeypatch):
    monkeypatch.setattr(batches, "_REPLACEMENTS", 3)
    monkeypatch.setattr(type(broken), "image", lambda *_: b"")
    skips = dataclasses.replace(DATA, on_error="skip")
    with pytest.raises(UserError, match="3 replacements are broken too"):
        next(training_batches(broken, skips, 1, 0, mesh=MESH()))
