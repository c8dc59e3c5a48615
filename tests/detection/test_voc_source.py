import numpy as np
import pytest
from PIL import Image

from resnet_jax.detection.sources.voc import open_voc
from resnet_jax.errors import UserError
from tests.detection.layouts import (
    needs_real_data,
    picture,
    real,
    voc_annotation,
    voc_object,
    write_voc,
)

IMAGES = {
    "one": (30, 20, [("dog", (0, 0, 30, 20)), ("cat", (4, 5, 5, 6))]),
    "two": (20, 30, [("cat", (1, 2, 3, 4), 1)]),
    "none": (8, 8, []),
}


@pytest.fixture
def root(tmp_path):
    return write_voc(tmp_path, "train", IMAGES)


def write_xml(root, text, name="one"):
    mode = "wb" if isinstance(text, bytes) else "w"
    with open(root / "Annotations" / f"{name}.xml", mode) as file:
        file.write(text)


def test_boxes_become_continuous_once(root):
    source = open_voc(root, "train")
    assert source.class_names == ("cat", "dog")
    assert source.notes == ()
    assert [source.name(i) for i in range(len(source))] == ["one", "two", "none"]
    one, two, none = (source.annotation(i) for i in range(3))
    # Over the whole image, and of one pixel: xmin equals xmax.
    np.testing.assert_array_equal(one.boxes, [(0, 0, 30, 20), (4, 5, 5, 6)])
    assert one.boxes.dtype == np.float32
    assert one.classes.tolist() == [1, 0]
    assert one.areas.tolist() == [600, 1]
    assert one.size == (20, 30)
    assert two.difficult.tolist() == [True]
    assert not one.difficult.any()
    assert none.boxes.shape == (0, 4)
    assert Image.open(root / "JPEGImages/two.png").size == (20, 30)
    assert source.image(1) == (root / "JPEGImages/two.png").read_bytes()


def test_classes_are_given_in_any_order(root):
    source = open_voc(root, "train", ("dog", "bird", "cat"))
    assert source.annotation(0).classes.tolist() == [0, 2]
    with pytest.raises(UserError, match=r"one\.xml has.*'cat', which is not.*\(dog\)"):
        open_voc(root, "train", ("dog",))


def test_lists_of_several_years_are_joined(tmp_path):
    for year, name in (("2007", "train"), ("2012", "val")):
        write_voc(tmp_path / f"VOC{year}", name, {year: IMAGES["one"]})
    write_voc(tmp_path / "VOC2012", "test", {"x": (9, 9, [("ant", (0, 0, 1, 1))])})
    source = open_voc(tmp_path, "2007/train+2012/val+2012/test")
    assert [source.name(i) for i in range(3)] == ["2007", "2012", "x"]
    assert source.class_names == ("ant", "cat", "dog")
    assert [len(source.annotation(i).classes) for i in range(3)] == [2, 2, 1]
    with pytest.raises(UserError, match=r"for the lists of .*VOC2007, give 2007/train"):
        open_voc(tmp_path, "train")
    with pytest.raises(UserError, match=r"no .*2007.*vall\.txt: valid are train"):
        open_voc(tmp_path, "2007/vall")


@pytest.mark.parametrize(
    "size", ["", "<size><width>0</width><height>0</height></size>"]
)
def test_the_image_gives_a_size_that_is_not_stated(root, size):
    box = voc_object("dog", (0, 0, 30, 20))
    write_xml(root, f"<annotation>{size}{box}</annotation>")
    assert open_voc(root, "train").annotation(0).size == (20, 30)
    (root / "JPEGImages" / "one.png").unlink()
    with pytest.raises(UserError, match=r"one\.xml states no size, and its image"):
        open_voc(root, "train")


def test_of_several_images_of_a_name_one_is_read(root):
    picture(30, 20, []).save(root / "JPEGImages" / "one.jpg")
    (root / "JPEGImages" / "one.txt").write_text("")
    assert open_voc(root, "train").image(0).startswith(b"\xff\xd8")


ENTITIES = "".join(f'<!ENTITY x{i + 1} "{f"&x{i};" * 10}">' for i in range(9))
BOMB = f'<!DOCTYPE a [<!ENTITY x0 "ha">{ENTITIES}]><annotation>&x9;</annotation>'
GOOD = voc_annotation(30, 20, voc_object("dog", (1, 1, 9, 9)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "its XML is damaged"),
        (GOOD[:-30], "its XML is damaged"),
        (b"\xff\xfe\x00", "its XML is damaged"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "its XML is damaged"),
        (BOMB, "it declares a document type"),
        (BOMB.encode("utf-16"), "it declares a document type"),
        ("<annotation>" + " " * 2**23 + "</annotation>", "it has more than 8 MiB"),
        ("<html/>", "its outermost element is 'html', not annotation"),
        (GOOD.replace("<height>20</height>", ""), "size has no height"),
        (GOOD.replace(">20<", ">20.5<"), "its size has a side of 20.5 pixels"),
        (GOOD.replace(">20<", ">-20<"), "its size has a side of -20 pixels"),
        (GOOD.replace(">20<", ">tall<"), "height of size is 'tall', not a number"),
        (GOOD.replace("<name>dog</name>", ""), "object 1 has no name"),
        (GOOD.replace("dog", " "), "object 1 has no name"),
        (GOOD.replace("<xmin>2</xmin>", ""), "object 1 has no xmin"),
        (GOOD.replace("<xmin>2<", "<xmin>nan<"), "xmin of object 1 is 'nan', not"),
        (GOOD.replace("<xmin>2<", "<xmin>1e99<"), "xmin of object 1 is '1e99', not"),
        (GOOD.replace("<xmin>2<", "<xmin>two<"), "xmin of object 1 is 'two', not"),
        (
            GOOD.replace("</name><difficult>0", "</name><difficult>maybe"),
            "difficult of",
        ),
        (
            GOOD.replace("</name><difficult>0", "</name><difficult>2"),
            "is 2, not 0 or 1",
        ),
        (
            voc_annotation(9, 9, "<object><name>a</name></object>"),
            "object 1 has no bnd",
        ),
    ],
)
def test_a_damaged_annotation_is_named(root, text, reason):
    write_xml(root, text)
    with pytest.raises(UserError) as caught:
        open_voc(root, "train")
    sentence = str(caught.value)
    assert reason in sentence
    assert "one.xml is not an annotation as in VOC" in sentence
    assert "\n" not in sentence
    assert sentence.endswith("remove one from the split")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no image"),
        ("one\ntwo\none\n", "names the image 'one' twice; remove one"),
        (
            "one\nthree\nfour",
            r"names 'three', but .*Annotations has no file of.* \(2 of 3",
        ),
        (b"\xff\xfe", "is not a text in UTF-8"),
        ("../Annotations/one", "has no file of that name"),
        ("9" * 5000, "names '" + "9" * 50 + "', but"),
    ],
)
def test_a_wrong_list_is_named(root, text, reason):
    file = root / "ImageSets" / "Main" / "train.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=reason):
        open_voc(root, "train")


def test_without_objects_the_classes_must_be_given(tmp_path):
    write_voc(tmp_path, "train", {"none": IMAGES["none"]})
    with pytest.raises(UserError, match=r"give data\.class_names"):
        open_voc(tmp_path, "train")
    assert len(open_voc(tmp_path, "train", ("a",))) == 1


def test_annotations_beside_their_images_are_read(root):
    (root / "valid").mkdir()
    for name in ("one", "two"):
        for folder, ending in (("Annotations", "xml"), ("JPEGImages", "png")):
            file = f"{name}.{ending}"
            (root / folder / file).rename(root / "valid" / file)
    source = open_voc(root, "valid")
    assert [source.name(i) for i in range(len(source))] == ["one", "two"]
    assert source.annotation(1).difficult.tolist() == [True]
    assert source.image(0) == (root / "valid" / "one.png").read_bytes()
    assert source.missing == []
    with pytest.raises(UserError, match=r"no .*valod\.txt: did you mean valid"):
        open_voc(root, "valod")


@needs_real_data
def test_all_of_voc_2007_test_is_read():
    source = open_voc(real("voc07test"), "test")
    found = [source.annotation(i) for i in range(len(source))]
    difficult = sum(int(each.difficult.sum()) for each in found)
    assert (len(source), sum(len(each.boxes) for each in found)) == (4952, 14976)
    assert difficult == 2944
    assert source.notes == ()
    assert len(source.class_names) == 20


@needs_real_data
def test_all_of_bccd_is_read():
    source = open_voc(real("BCCD"), "trainval+test")
    assert source.class_names == ("Platelets", "RBC", "WBC")
    assert sum(len(source.annotation(i).boxes) for i in range(364)) == 4888
