import copy
import json

import numpy as np
import pytest

from resnet_jax.detection.sources.coco import has_coco, open_coco
from resnet_jax.errors import UserError
from tests.detection.layouts import (
    coco_content,
    needs_real_data,
    real,
    write_coco,
    write_instances,
)

CATEGORIES = {90: "cat", 3: "dog", 7: "ant"}
IMAGES = {
    "one.png": (30, 20, [("dog", (0, 0, 30, 20)), ("cat", (4, 5, 6, 9))]),
    "none.png": (8, 8, []),
    "two.png": (20, 30, [("cat", (1, 2, 3, 4))]),
}
CONTENT = coco_content(IMAGES, CATEGORIES)


@pytest.fixture
def root(tmp_path):
    return write_coco(tmp_path, "train", IMAGES, CATEGORIES)


def test_boxes_classes_and_backgrounds_are_read(root):
    content = copy.deepcopy(CONTENT)
    content["annotations"].reverse()
    content["annotations"][0] |= {
        "iscrowd": 1,
        "segmentation": {"counts": [1, 2], "size": [30, 20]},
    }
    write_instances(root, "train", content)
    source = open_coco(root, "train")
    assert source.class_names == ("dog", "ant", "cat")
    assert source.category_ids == (3, 7, 90)
    assert source.image_ids.tolist() == [
        10,
        20,
        30,
    ]
    assert [source.name(i) for i in range(3)] == list(IMAGES)
    one, none, two = (source.annotation(i) for i in range(3))
    np.testing.assert_array_equal(one.boxes, [(4, 5, 6, 9), (0, 0, 30, 20)])
    assert one.classes.tolist() == [2, 0]
    assert one.areas.tolist() == [4, 300]
    assert two.crowd.tolist() == [True]
    assert not one.crowd.any()
    assert none.boxes.shape == (0, 4)
    assert none.size == (8, 8)
    assert source.image(2) == (root / "train" / "two.png").read_bytes()


def test_a_file_may_do_without_areas_crowds_sizes_and_ids(root):
    content = copy.deepcopy(CONTENT)
    for each in content["annotations"]:
        del each["area"], each["iscrowd"], each["id"], each["segmentation"]
    for each in content["images"]:
        del each["width"], each["height"]
    write_instances(root, "train", content)
    source = open_coco(root, "train")
    assert source.annotation(0).areas.tolist() == [600, 8]
    assert source.annotation(2).size == (30, 20)


def test_classes_in_another_order_keep_their_ids(root):
    source = open_coco(root, "train", ("cat", "dog", "ant"))
    assert source.category_ids == (90, 3, 7)
    assert source.annotation(0).classes.tolist() == [1, 0]
    with pytest.raises(UserError, match="'cow' is in one of them alone"):
        open_coco(root, "train", ("cat", "dog", "ant", "cow"))


def test_splits_are_joined(root):
    write_coco(root, "val", {"x.png": IMAGES["two.png"]}, CATEGORIES)
    source = open_coco(root, "train+val")
    assert [source.name(i) for i in range(4)] == [*IMAGES, "x.png"]
    assert source.image_ids.tolist() == [10, 20, 30, 10]
    write_coco(root, "other", IMAGES, {1: "cat", 2: "dog", 3: "ant"})
    with pytest.raises(UserError, match="number their categories differently"):
        open_coco(root, "train+other")
    with pytest.raises(
        UserError, match=r"no .*instances_tran\.json: did you mean train"
    ):
        open_coco(root, "tran")


@pytest.mark.parametrize("under", ["images/train", "images"])
def test_images_are_found_in_other_folders(root, under):
    (root / "train").rename(root / "moved")
    (root / under).parent.mkdir(exist_ok=True)
    (root / "moved").rename(root / under)
    source = open_coco(root, "train")
    assert source.missing == []
    assert source.image(0).startswith(b"\x89PNG")
    (root / under / "one.png").unlink()
    assert open_coco(root, "train").missing == ["one.png"]


def test_annotations_beside_their_images_are_read(root):
    (root / "annotations" / "instances_train.json").rename(
        root / "train" / "_annotations.coco.json"
    )
    assert has_coco(root)
    source = open_coco(root, "train")
    assert len(source) == 3
    assert source.missing == []


def edited(path, value):
    """The content with the field at ``path`` replaced."""
    content = copy.deepcopy(CONTENT)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "its JSON is damaged"),
        (json.dumps(CONTENT)[:-9], "its JSON is damaged"),
        ("[" * 100_000, "its JSON is damaged"),
        ("[" + "9" * 5000 + "]", "its JSON is damaged"),
        ("[]", "it holds [], not an object"),
        ("{}", "categories is missing, not a list"),
        (edited(["images"], {}), "images is {}, not a list"),
        (edited(["images"], []), "it has no images"),
        (edited(["images", 0], 7), "images[0] is 7, not an object"),
        (edited(["images", 0, "id"], "10"), "id of images[0] is '10'"),
        (edited(["images", 0, "id"], True), "id of images[0] is True"),
        (edited(["images", 0, "id"], 10**30), "id of images[0] is 1000"),
        (
            edited(["images", 0, "id"], 20),
            "images[1] has the id or the file_name of an",
        ),
        (
            edited(["images", 1, "file_name"], "one.png"),
            "images[1] has the id or the f",
        ),
        (edited(["images", 1, "file_name"], ""), "file_name of images[1] is ''"),
        (edited(["images", 1, "file_name"], "a\0"), "file_name of images[1] is"),
        (edited(["images", 1, "file_name"], "\ud800"), "file_name of images[1] is"),
        (edited(["images", 1, "width"], 8.5), "width of images[1] is 8.5"),
        (edited(["images", 1, "width"], -8), "width of images[1] is -8"),
        (edited(["images", 1, "width"], 10**400), "width of images[1] is 1000"),
        (edited(["categories"], []), "it has no categories"),
        (edited(["categories", 1, "id"], 90), "categories[1] has the id or the name"),
        (edited(["categories", 1, "name"], "cat"), "categories[1] has the id or the n"),
        (edited(["annotations"], None), "annotations is missing, not a list"),
        (edited(["annotations", 1, "id"], 1), "annotations[1] has the id 1 of an earl"),
        (
            edited(["annotations", 1, "image_id"], 5),
            "has the image_id 5, which no image",
        ),
        (
            edited(["annotations", 1, "image_id"], [5]),
            "image_id of annotations[1] is [5]",
        ),
        (
            edited(["annotations", 1, "category_id"], 4),
            "has the category_id 4, which no",
        ),
        (
            edited(["annotations", 1, "bbox"], [1, 2, 3]),
            "is [1, 2, 3], not x, y, width",
        ),
        (
            edited(["annotations", 1, "bbox", 0], float("nan")),
            "is [nan, 5, 2, 4], not x",
        ),
        (edited(["annotations", 1, "bbox", 0], "1"), "is ['1', 5, 2, 4], not x, y"),
        (edited(["annotations", 1, "bbox"], None), "bbox of annotations[1] is None"),
        (edited(["annotations", 1, "iscrowd"], 2), "iscrowd of annotations[1] is 2"),
        (edited(["annotations", 1, "iscrowd"], {}), "iscrowd of annotations[1] is {}"),
        (edited(["annotations", 1, "area"], "big"), "area of annotations[1] is 'big'"),
    ],
)
def test_a_damaged_file_is_named(root, content, reason):
    write_instances(root, "train", content)
    with pytest.raises(UserError) as caught:
        open_coco(root, "train")
    sentence = str(caught.value)
    assert reason in sentence
    assert "instances_train.json is not in COCO" in sentence
    assert "\n" not in sentence
    assert len(sentence) < 400


@needs_real_data
def test_a_part_of_coco_is_read():
    source = open_coco(real("coco-small"), "train2017")
    found = [source.annotation(i) for i in range(len(source))]
    assert (len(source), sum(len(each.boxes) for each in found)) == (80, 705)
    assert sum(int(each.crowd.sum()) for each in found) > 0
    assert len(source.class_names) == 80
    assert source.category_ids[-1] == 90
