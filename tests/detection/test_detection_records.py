import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from resnet_jax.config.detection import DetectionDataConfig
from resnet_jax.data.sources import open_path
from resnet_jax.detection.prepare import prepare_detection
from resnet_jax.detection.sources import open_detection_data, open_source
from resnet_jax.errors import UserError
from resnet_jax.prepare import shards, verify
from tests.conftest import make_console
from tests.detection.layouts import write_coco, write_voc

IMAGES = {
    "one": (30, 20, [("dog", (0, 0, 30, 20)), ("cat", (4, 5, 5, 6))]),
    "two": (20, 30, [("cat", (1, 2, 3, 4), 1)]),
    "none": (8, 8, []),
    "four": (9, 9, [("dog", (1, 2, 3, 4))]),
}
TEST = {"five": (9, 8, [("dog", (1, 2, 3, 4))])}


def prepare(source, output, **options):
    return prepare_detection(source, output, console=make_console(), **options)


@pytest.fixture
def voc(tmp_path):
    write_voc(tmp_path / "voc", "trainval", IMAGES)
    return write_voc(tmp_path / "voc", "test", TEST)


def assert_same(source, other, images=None):
    images = images or [(i, i) for i in range(len(other))]
    assert source.class_names == other.class_names
    assert source.category_ids == other.category_ids
    for ours, theirs in images:
        assert source.name(ours) == other.name(theirs)
        assert source.image(ours) == other.image(theirs)
        a, b = source.annotation(ours), other.annotation(theirs)
        for field in dataclasses.fields(a):
            left, right = getattr(a, field.name), getattr(b, field.name)
            np.testing.assert_array_equal(left, right)
            assert np.asarray(left).dtype == np.asarray(right).dtype


def test_prepared_images_are_those_of_the_source(voc, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(voc, out, num_shards=2)
    assert manifest["splits"]["trainval"]["examples"] == 4
    plain = open_detection_data(DetectionDataConfig(path=str(voc)))
    opened = open_detection_data(DetectionDataConfig(path=str(out)))
    assert_same(opened.train, plain.train)
    assert_same(opened.test, plain.test)
    assert opened.identity.kind == "prepared"
    assert plain.identity.kind == "voc"
    assert opened.identity.version == plain.identity.version
    again = pickle.loads(pickle.dumps(opened.train))
    assert_same(again, plain.train)
    joined = open_source(str(out), "test+trainval")
    assert [joined.name(i) for i in range(2)] == ["five", "one"]
    verify(out, console=make_console())
    with pytest.raises(UserError, match="was prepared for detection: its images have"):
        open_path(out)


def test_coco_keeps_its_ids(tmp_path):
    images = {f"{name}.png": each for name, each in TEST.items()}
    root = write_coco(tmp_path / "coco", "val", images, {9: "dog", 4: "cat"})
    prepare(root, tmp_path / "out", splits=["val"])
    opened = open_source(str(tmp_path / "out"), "val")
    assert_same(opened, open_source(str(root), "val"))
    assert opened.category_ids == (4, 9)
    assert opened.image_ids.tolist() == [10]


def test_years_are_prepared_one_by_one(tmp_path):
    for year, images in (("2007", IMAGES), ("2012", TEST)):
        write_voc(tmp_path / "voc" / f"VOC{year}", "train", images)
    both = "2007/train+2012/train"
    prepare(tmp_path / "voc", tmp_path / "out", splits=[both])
    opened = open_source(str(tmp_path / "out"), both)
    assert_same(opened, open_source(str(tmp_path / "voc"), both))
    with pytest.raises(UserError, match="has no split '2007_val': did you mean"):
        open_source(str(tmp_path / "out"), "2007/val")
    with pytest.raises(UserError, match="prepared with the classes cat, dog"):
        open_source(str(tmp_path / "out"), both, class_names=["dog", "cat"])


def test_broken_images_stop_or_are_left_out(voc, tmp_path):
    (voc / "JPEGImages" / "two.png").write_bytes(b"")
    xml = voc / "Annotations" / "four.xml"
    xml.write_text(xml.read_text().replace("<width>9<", "<width>10<"))
    with pytest.raises(UserError, match=r"example . of trainval is broken: image"):
        prepare(voc, tmp_path / "out")
    manifest = prepare(voc, tmp_path / "out", on_error="skip")
    left_out = manifest["splits"]["trainval"]["left_out"]
    assert [item["index"] for item in left_out] == [1, 3]
    opened = open_source(str(tmp_path / "out"), "trainval")
    assert len(opened) == 2
    assert_same(opened, open_source(str(voc), "trainval"), [(0, 0), (1, 2)])


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_interrupted_run_continues_to_the_same_bytes(voc, tmp_path, monkeypatch):
    whole = prepare(voc, tmp_path / "whole", num_shards=4)
    written = []
    write_shard = shards.write_shard

    def stop_at_third(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(write_shard(*arguments))
        return written[-1]

    out = tmp_path / "out"
    monkeypatch.setattr(shards, "write_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(voc, out, num_shards=4, threads=1)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"is only partly prepared; run the same"):
        open_source(str(out), "trainval")
    changed = voc / "Annotations" / "one.xml"
    text = changed.read_text()
    changed.write_text(text.replace("<xmin>5<", "<xmin>4<"))
    with pytest.raises(UserError, match="was begun with another annotations_sha256"):
        prepare(voc, out, num_shards=4)
    changed.write_text(text)
    resumed = prepare(voc, out, num_shards=4)
    assert resumed["splits"] == whole["splits"]
    assert resumed["annotations"] == whole["annotations"]
    found, expected = files(out), files(tmp_path / "whole")
    del found["manifest.json"], expected["manifest.json"]
    assert found == expected
    assert prepare(voc, out, num_shards=4) == resumed


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda file: file.write_bytes(file.read_bytes()[:-9]),
            "is damaged: its checks",
        ),
        (lambda file: file.unlink(), "cannot be read"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "is not a regular file"),
    ],
)
def test_damaged_annotations_are_named(voc, tmp_path, damage, sentence):
    out = tmp_path / "out"
    prepare(voc, out)
    damage(out / "test.annotations.npz")
    assert len(open_source(str(out), "trainval")) == 4
    with pytest.raises(UserError, match=rf"test\.annotations\.npz {sentence}"):
        open_source(str(out), "test")
    with pytest.raises(UserError, match=r"shard .*test\.annotations\.npz .*; delete"):
        verify(out, console=make_console())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"files": {}}, "annotations has other splits"),
        ({"category_ids": ["1"]}, "category_ids is"),
        ({"files": None}, "files of annotations is None"),
    ],
)
def test_a_damaged_manifest_is_named(voc, tmp_path, change, reason):
    prepare(voc, tmp_path / "out")
    file = tmp_path / "out" / "manifest.json"
    content = json.loads(file.read_text())
    content["annotations"] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"manifest\.json is damaged.*{reason}"):
        open_source(str(tmp_path / "out"), "test")


def test_wrong_arguments_are_named(voc, tmp_path):
    for options, sentence in (
        ({"splits": []}, "no split is named"),
        ({"num_shards": 0}, "shards must be at least 1"),
        ({"on_error": "go"}, "on_error is stop or skip"),
        ({"splits": ["val"]}, r"there is no .*val\.txt"),
    ):
        with pytest.raises(UserError, match=sentence):
            prepare(voc, tmp_path / "out", **options)
    with pytest.raises(UserError, match="is inside the source"):
        prepare(voc, voc / "out")


PREPARE_TFDS = """
import io, sys
import cv2, numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.object_detection import voc

class Examples:
    def _split_generators(self, dl_manager):
        splits = {"train": range(3), "validation": [3]}
        return {k: self._generate_examples(n) for k, n in splits.items()}

    def _generate_examples(self, numbers):
        is_voc = self.name == "voc"
        if not is_voc:
            names = ["dog", *map(str, range(79))]
            self.info.features["objects"]["label"].names = names
        for i in numbers:
            height, width = 375 + i, 500
            _, png = cv2.imencode(".png", np.full((height, width, 3), i, np.uint8))
            box = tfds.features.BBox(
                ymin=2 / height, xmin=1 / width, ymax=height / height, xmax=333 / width
            )
            fields = {"is_crowd": True, "area": 77, "id": 1}
            more = {"image/id": 10 + i}
            if is_voc:
                fields = {"is_difficult": True, "is_truncated": False, "pose": 0}
                more = {"labels": [], "labels_no_difficult": []}
            yield i, {
                "image": io.BytesIO(png.tobytes()),
                "image/filename": f"00000{i}.jpg",
                "objects": [{"bbox": box, "label": "dog", **fields}] * i,
                **more,
            }

kind, data_dir = sys.argv[1:]
with tfds.core.registered.skip_registration():
    class Voc(Examples, voc.Voc):
        pass
    class Coco(Examples, tfds.core.GeneratorBasedBuilder):
        # tfds's own describes itself with TensorFlow.
        VERSION = tfds.core.Version("1.1.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2017")]

        def _info(self):
            objects = {
                "id": np.int64,
                "area": np.int64,
                "bbox": tfds.features.BBoxFeature(),
                "label": tfds.features.ClassLabel(num_classes=80),
                "is_crowd": np.bool_,
            }
            features = tfds.features.FeaturesDict({
                "image": tfds.features.Image(encoding_format="jpeg"),
                "image/filename": tfds.features.Text(),
                "image/id": np.int64,
                "objects": tfds.features.Sequence(objects),
            })
            return tfds.core.DatasetInfo(builder=self, features=features)
builder = {"voc": Voc, "coco": Coco}[kind]
builder(
    config={"voc": "2007", "coco": "2017"}[kind],
    data_dir=data_dir,
    file_format="array_record",
).download_and_prepare()
"""


@pytest.fixture(params=["voc", "coco"])
def tfds_source(request, tmp_path):
    """A name in tfds and a folder with a few examples under it."""
    program = tmp_path / "prepare.py"
    program.write_text(PREPARE_TFDS)
    command = [sys.executable, str(program), request.param, str(tmp_path / "tfds")]
    subprocess.run(command, check=True, capture_output=True)
    year = {"voc": "2007", "coco": "2017"}[request.param]
    return f"{request.param}/{year}", str(tmp_path / "tfds")


def test_tfds_is_read_as_the_files_were(tfds_source, tmp_path):
    name, data_dir = tfds_source
    is_voc = name == "voc/2007"
    data = DetectionDataConfig(
        name=name,
        data_dir=data_dir,
        train_split="train+validation",
        test_split="validation",
    )
    opened = open_detection_data(data)
    train = opened.train
    assert len(opened.class_names) == (20 if is_voc else 80)
    assert opened.identity.kind == "tfds"
    assert opened.identity.counts == {"train": 4, "test": 1}
    suffix = "" if is_voc else ".jpg"
    by_name = {train.name(i): i for i in range(4)}
    assert sorted(by_name) == [f"00000{number}{suffix}" for number in range(4)]
    for number in range(4):
        found = train.annotation(by_name[f"00000{number}{suffix}"])
        assert found.size == (375 + number, 500)
        # VOC's files count pixels from 1, and tfds divides them as they are.
        first = (0, 1) if is_voc else (1, 2)
        expected = np.tile([*first, 333, 375 + number], (number, 1))
        np.testing.assert_array_equal(found.boxes, expected.reshape(-1, 4))
        assert found.difficult.all() == (is_voc or number == 0)
        assert found.crowd.all() == (not is_voc or number == 0)
        assert (found.classes == opened.class_names.index("dog")).all()
        if not is_voc:
            assert found.areas.tolist() == [77] * number
    ids = train.image_ids
    assert ids is None if is_voc else sorted(ids) == [10, 11, 12, 13]
    given = f"tfds:{name}"
    prepare(given, tmp_path / "out", splits=["validation"], data_dir=data_dir)
    assert_same(open_source(str(tmp_path / "out"), "validation"), opened.test)
    with pytest.raises(UserError, match="has no split 'val'; its splits are train"):
        open_source(given, "val", data_dir=data_dir)
    with pytest.raises(UserError, match=r"has the classes .*; data\.class_names"):
        open_source(given, "train", class_names=["cat"], data_dir=data_dir)


@pytest.mark.parametrize("tfds_source", ["coco"], indirect=True)
def test_damaged_tfds_data_are_named(tfds_source):
    name, data_dir = tfds_source
    folder = next(Path(data_dir).glob("coco/2017/*"))
    (shard,) = folder.glob("*-train.array_record*")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=r"record coco/2017.*train\[\d\] of tfds is miss"
    ):
        open_source(f"tfds:{name}", "train", data_dir=data_dir)
    (folder / "features.json").write_text("{")
    with pytest.raises(UserError, match="tfds data set coco/2017 cannot be opened"):
        open_source(f"tfds:{name}", "train", data_dir=data_dir)


def test_tfds_data_without_boxes_are_refused(tfds_dir):
    with pytest.raises(UserError, match="expected an image and a sequence of objects"):
        open_source("tfds:digits", "train", data_dir=tfds_dir)
