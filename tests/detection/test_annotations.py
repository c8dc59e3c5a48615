import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image

from resnet_jax.config.detection import DetectionDataConfig
from resnet_jax.data.sources.folders import Names
from resnet_jax.detection.annotations import (
    AnnotationTable,
    FileSource,
    Joined,
    decode,
)
from resnet_jax.detection.sources import open_detection_data
from resnet_jax.detection.sources.voc import open_voc
from resnet_jax.errors import UserError
from tests.detection.layouts import picture, write_coco, write_voc

SIZES = [(20, 30), (40, 10), (5, 5)]


def table(boxes, counts, sizes=SIZES, **marks):
    return AnnotationTable.build(sizes, counts, boxes, range(len(boxes)), **marks)


def test_a_table_gives_each_image_its_objects():
    boxes = [(0, 0, 30, 20), (1, 2, 3, 5), (0, 0, 5, 5)]
    made = table(boxes, [2, 0, 1], difficult=[0, 1, 0])
    first, second, third = (made[i] for i in range(3))
    assert first.size == (20, 30)
    assert second.size == (40, 10)
    np.testing.assert_array_equal(first.boxes, boxes[:2])
    assert first.areas.tolist() == [600, 6]
    assert first.difficult.tolist() == [False, True]
    assert second.boxes.shape == (0, 4)
    assert second.classes.shape == (0,)
    assert third.classes.tolist() == [2]
    with pytest.raises(IndexError):
        made[3]


@pytest.mark.parametrize(
    ("box", "kept", "note"),
    [
        ((0, 0, 30, 20), True, None),
        ((7, 7, 8, 8), True, None),
        ((-1, -2, 31, 22), True, None),
        ((-3, 0, 30, 20), True, "1 box reaches out of the image by more than 2 pixels"),
        ((3, 3, 3, 9), False, "1 box has no area inside the image"),
        ((9, 3, 3, 9), False, "1 box has no area inside the image"),
        ((30, 0, 40, 9), False, "1 box has no area inside the image"),
        ((-9, -9, 0, 0), False, "1 box has no area inside the image"),
    ],
)
def test_boxes_without_area_are_left_out_with_a_note(box, kept, note):
    boxes = [(1, 1, 2, 2), box, (0, 0, 5, 5)]
    made, notes = table(boxes, [2, 0, 1]).checked("abc".__getitem__)
    assert made[0].classes.tolist() == ([0, 1] if kept else [0])
    assert made[2].classes.tolist() == [2]
    assert len(notes) == (note is not None)
    assert all(line.startswith(note) and "first in a" in line for line in notes)


def test_no_objects_at_all_are_checked():
    made, notes = table([], [0, 0, 0]).checked("abc".__getitem__)
    assert len(made) == 3
    assert not notes
    assert made[2].boxes.shape == (0, 4)


def test_sources_are_joined_and_sent_to_processes():
    parts = [
        FileSource(
            names=Names(names),
            files=Names([""] * len(names)),
            table=table([(0, 0, 1, 1)] * len(names), [1] * len(names), [(9, 9)] * n),
            class_names=("a",),
        )
        for n, names in ((1, "a"), (2, "bc"))
    ]
    joined = pickle.loads(pickle.dumps(Joined(parts)))
    assert [joined.name(i) for i in range(len(joined))] == ["a", "b", "c"]
    assert joined.annotation(2).classes.tolist() == [1]
    assert joined.missing == ["a", "b", "c"]
    assert joined.image_ids is None
    for index in (-1, 3):
        with pytest.raises(IndexError):
            joined.name(index)
    with pytest.raises(UserError, match="image b has an annotation, but no file; add"):
        joined.image(1)


def test_an_image_of_another_size_than_its_annotation_is_refused(tmp_path):
    images = {"a": (8, 6, [("cat", (1, 1, 3, 3))]), "b": (6, 8, [])}
    source = open_voc(write_voc(tmp_path, "train", images), "train")
    assert decode(source, 0).shape == (6, 8, 3)
    file = tmp_path / "JPEGImages" / "a.png"
    file.write_bytes((tmp_path / "JPEGImages" / "b.png").read_bytes())
    with pytest.raises(UserError, match=r"image a is 6 x 8, but.*states 8 x 6.*EXIF"):
        decode(source, 0)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="image a cannot be decoded"):
        decode(source, 0)


def test_the_rotation_in_exif_is_not_applied(tmp_path):
    images = {"flat": (8, 6, []), "upright": (6, 8, [])}
    root = write_voc(tmp_path, "train", images)
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees
    for name in images:
        (root / "JPEGImages" / f"{name}.png").unlink()
        picture(8, 6, []).save(root / "JPEGImages" / f"{name}.jpg", exif=exif)
    source = open_voc(root, "train", ("cat",))
    assert decode(source, 0).shape == (6, 8, 3)
    with pytest.raises(
        UserError, match=r"image upright is 8 x 6, but.* 6 x 8, perhaps"
    ):
        decode(source, 1)


IMAGES = {"a.png": (8, 6, [("cat", (1, 1, 3, 3)), ("dog", (0, 0, 8, 6))])}
MORE = {"b.png": (6, 8, [("dog", (1, 1, 3, 3))])}


@pytest.fixture(params=["voc", "coco"])
def root(request, tmp_path):
    for split, images in (("trainval", IMAGES), ("test", MORE)):
        if request.param == "voc":
            write_voc(tmp_path, split, images)
        else:
            write_coco(tmp_path, split, images, {3: "cat", 7: "dog"})
    return tmp_path


def test_either_layout_is_opened_and_identified(root):
    data = DetectionDataConfig(path=str(root))
    opened = open_detection_data(data)
    assert opened.class_names == opened.test.class_names == ("cat", "dog")
    assert opened.test.annotation(0).classes.tolist() == [1]
    assert opened.identity.counts == {"train": 1, "test": 1}
    assert opened.notes == ()
    same = open_detection_data(dataclasses.replace(data, test_split="trainval"))
    assert same.notes == ("1 of the 1 test images have the name of a training image",)
    assert opened.identity.difference(open_detection_data(data).identity) is None
    named = DetectionDataConfig(path=str(root), class_names=("dog", "cat"))
    other = open_detection_data(named)
    assert other.train.annotation(0).classes.tolist() == [1, 0]
    assert "class 0 is 'dog', not 'cat'" in opened.identity.difference(other.identity)


def test_a_changed_box_is_another_identity(tmp_path):
    before = open_detection_data(
        DetectionDataConfig(
            path=str(write_voc(tmp_path, "trainval", IMAGES)), test_split="trainval"
        )
    )
    file = tmp_path / "Annotations" / "a.png.xml"
    file.write_text(file.read_text().replace("<xmin>2<", "<xmin>3<"))
    after = open_detection_data(
        DetectionDataConfig(path=str(tmp_path), test_split="trainval")
    )
    assert "their version is" in before.identity.difference(after.identity)


def test_wrong_folders_are_named(tmp_path):
    def open_(**fields):
        return open_detection_data(DetectionDataConfig(**fields))

    with pytest.raises(UserError, match=r"data\.path .*nowhere is not a folder; give"):
        open_(path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds neither: expected Annotations"):
        open_(path=str(tmp_path))
    write_voc(tmp_path, "trainval", IMAGES)
    with pytest.raises(UserError, match=r"there is no .*test\.txt"):
        open_(path=str(tmp_path))
    write_voc(tmp_path, "test", MORE)
    (tmp_path / "JPEGImages" / "b.png.png").unlink()
    with pytest.raises(
        UserError, match=r"1 of the 1 images of split test have no file"
    ):
        open_(path=str(tmp_path))
    assert len(open_(path=str(tmp_path), on_error="skip").test) == 1
    write_coco(tmp_path, "test", MORE, {1: "dog"})
    with pytest.raises(UserError, match=r"holds both layouts.*set data\.format"):
        open_(path=str(tmp_path))
