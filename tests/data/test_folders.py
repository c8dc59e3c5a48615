import os
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from resnet_jax.data.sources import Subset, imagenet, open_path
from resnet_jax.data.sources.folders import Names
from resnet_jax.errors import UserError

WNIDS = ("n01440764", "n01443537", "n02099601")


def touch(folder, *names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())


def contents(source):
    return [source[i].image.decode() for i in range(len(source))]


def walked(folder):
    """Images in the order in which torchvision's ImageFolder takes them."""
    found = []
    for label, name in enumerate(sorted(os.listdir(folder))):
        for root, _, files in sorted(os.walk(folder / name, followlinks=True)):
            for file in sorted(files):
                if file.lower().endswith((".jpg", ".jpeg", ".png")):
                    found.append((os.path.join(root, file), label))
    return found


def test_order_is_torchvisions_at_any_depth(tmp_path):
    touch(
        tmp_path / "train",
        *("b/1.jpg", "b/10.jpg", "b/2.JPEG", "b/images/z.png", "b/images-a/k.jpg"),
        *("b/images/deep/er/q.jpg", "B/x.jpg", "a b/ä.jpg", "a b/notes.txt"),
        *("b/images.jpg/inside.png", "b/Z.jpg"),
    )
    elsewhere = tmp_path / "linked"
    touch(elsewhere, "l.jpg")
    (tmp_path / "train" / "b" / "link").symlink_to(elsewhere)
    source = open_path(tmp_path).source("train")
    found = [(source[i].name, source[i].label) for i in range(len(source))]
    assert found == walked(tmp_path / "train")
    assert source.class_names == ("B", "a b", "b")


def test_hidden_files_and_folders_are_no_images(tmp_path):
    touch(tmp_path / "train", "a/._1.jpg", "a/1.jpg", "a/.trash/2.jpg", ".git/3.jpg")
    assert contents(open_path(tmp_path).source("train")) == ["a/1.jpg"]


def test_leftovers_of_systems_are_no_classes_and_no_images(tmp_path):
    touch(tmp_path / "train", "a/1.jpg", "b/2.jpg", "b/Thumbs.db", "desktop.ini")
    for folder in ("@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "#recycle"):
        touch(tmp_path / "train", f"{folder}/1.jpg", f"a/{folder}/1.jpg")
        touch(tmp_path, f"{folder}/a/1.jpg")
    collection = open_path(tmp_path)
    source = collection.source("train")
    assert collection.description.splits == ("train",)
    assert source.class_names == ("a", "b")
    assert contents(source) == ["a/1.jpg", "b/2.jpg"]
    assert source.notes == ()


def test_every_ending_of_an_image_counts_and_others_are_reported(tmp_path):
    ends = ("jpg", "JFIF", "jpe", "gif", "pbm", "pnm", "webp")
    touch(tmp_path / "train", *(f"a/{i}.{end}" for i, end in enumerate(ends)))
    touch(tmp_path / "train", "a/b/x.TXT", "a/y.txt", "a/none", "loose.jpg")
    touch(tmp_path, "test/a/1.jpg", "test/a/x.heic")
    collection = open_path(tmp_path)
    train = collection.source("train")
    assert len(train) == len(ends)
    (note,) = train.notes
    assert note.endswith(
        "train: ignored 4 files: 2 .txt, 1 without an ending, 1 .jpg beside the class "
        "folders"
    )
    both = collection.source("train[:50%]+test+train[60%:]")
    assert both.notes == (note, f"{tmp_path}/test: ignored 1 file: 1 .heic")
    assert Subset(both, np.arange(2)).notes == both.notes


def test_parts_of_splits_are_read(tmp_path):
    touch(tmp_path / "train", *(f"a/{i}.jpg" for i in range(10)))
    collection = open_path(tmp_path)
    part = collection.source("train[:20%]+train[-1:]")
    for source in (part, pickle.loads(pickle.dumps(part))):
        assert contents(source) == ["a/0.jpg", "a/1.jpg", "a/9.jpg"]
    description = collection.description
    assert (description.splits, description.num_examples["train"]) == (("train",), 10)
    assert description.image_shape is None
    with pytest.raises(UserError, match=r"has no split 'val'; its splits are train"):
        collection.source("val[:10%]")


def test_a_split_is_listed_only_when_it_is_used(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "test/unlabelled.jpg")
    collection = open_path(tmp_path)
    assert len(collection.source("train")) == 1
    assert collection.description.splits == ("test", "train")
    with pytest.raises(
        UserError, match=r"images and no class folders; expected .*or a"
    ):
        collection.source("test")


def test_an_empty_class_is_named(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.txt")
    with pytest.raises(UserError, match=r"class folder .*train/b holds no images"):
        open_path(tmp_path).source("train")


def test_an_image_that_has_gone_is_named(tmp_path):
    touch(tmp_path, "train/a/1.jpg")
    source = open_path(tmp_path).source("train")
    (tmp_path / "train" / "a" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"a/1\.jpg cannot be read: No such file"):
        source[0]


def test_what_is_no_regular_file_is_named(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "val/1.jpg")
    os.mkfifo(tmp_path / "train" / "a" / "2.jpg")
    (tmp_path / "train" / "a" / "3.jpg").symlink_to("/dev/zero")
    (tmp_path / "val.txt").symlink_to("/dev/zero")
    source = open_path(tmp_path).source("train")
    for i in (1, 2):
        with pytest.raises(UserError, match=rf"{i + 1}\.jpg cannot be read: it is not"):
            source[i]
    with pytest.raises(
        UserError, match=r"val\.txt cannot be read: it is not a regular"
    ):
        open_path(tmp_path).source("val")


def test_names_take_little_more_than_their_letters():
    listed = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(100_000)]
    names = Names(listed)
    assert len(pickle.dumps(names)) < sum(map(len, listed)) + 5 * len(listed)
    assert [names[i] for i in (0, 1, 99_999)] == [listed[0], listed[1], listed[-1]]
    strange = ["\udcff.jpg", "日本.jpg"]  # a name that is not UTF-8
    assert [Names(strange)[i] for i in (0, 1)] == strange
    assert Names(["ab", "c"]).checksum() != Names(["a", "bc"]).checksum()


@pytest.fixture
def extracted(tmp_path):
    """ImageNet as extracted: three classes, and five validation images."""
    touch(tmp_path / "train", *(f"{wnid}/{wnid}_1.JPEG" for wnid in WNIDS))
    touch(tmp_path / "val", *map(imagenet.VALIDATION_NAME.format, range(1, 6)))
    return tmp_path


def labels(collection, split="val"):
    source = collection.source(split)
    return [source[i].label for i in range(len(source))]


@pytest.mark.parametrize("as_number", [False, True])
def test_a_list_of_ones_own_gives_the_labels(extracted, as_number):
    expected = [2, 0, 1, 1, 2]
    lines = [
        f"{imagenet.VALIDATION_NAME.format(i)} {label if as_number else WNIDS[label]}"
        for i, label in enumerate(expected, 1)
    ]
    (extracted / "val.txt").write_text("\n".join(reversed(lines)) + "\n\n")
    assert labels(open_path(extracted)) == expected


@pytest.mark.parametrize(
    ("classes", "given", "expected"),
    [
        ("123", "012", [0, 1, 2]),  # numbers, since 0 is no class
        ("123", "321", [2, 1, 0]),  # names, since 3 is no number of a class
        ("12", "11", [0, 0]),  # either is possible: names
        (("0", "1", "10", "2"), ("10", "2", "1", "0"), [2, 3, 1, 0]),
        ("abc", ("002", "0", "01"), [2, 0, 1]),
    ],
)
def test_a_list_is_read_in_one_way(tmp_path, classes, given, expected):
    touch(tmp_path / "train", *(f"{name}/1.jpg" for name in classes))
    touch(tmp_path / "val", *(f"{i}.jpg" for i in range(len(given))))
    lines = [f"{i}.jpg {label}\n" for i, label in enumerate(given)]
    (tmp_path / "val.txt").write_text("".join(lines), "utf-8-sig")
    assert labels(open_path(tmp_path)) == expected


def test_a_list_that_mixes_names_and_numbers_is_refused(tmp_path):
    touch(tmp_path, *(f"train/{i}/1.jpg" for i in (1, 2, 3)))
    touch(tmp_path, *(f"val/{i}.jpg" for i in range(3)))
    (tmp_path / "val.txt").write_text("0.jpg 1\n1.jpg 0\n2.jpg 3\n")
    with pytest.raises(
        UserError,
        match=r"mixes numbers and names: the label 0 in line 2 is .*, and 3 in "
        r"line 3 is no number from 0 to 2; give the names",
    ):
        open_path(tmp_path).source("val")


def test_kaggles_list_is_found_where_its_archive_has_it(extracted):
    deep = extracted / "ILSVRC" / "Data" / "CLS-LOC"
    deep.mkdir(parents=True)
    shutil.move(extracted / "train", deep)
    shutil.move(extracted / "val", deep)
    rows = ["ImageId,PredictionString"] + [
        f"ILSVRC2012_val_{i:08d},{WNIDS[i % 3]} 85 1 499 272 {WNIDS[i % 3]} 1 2 3 4 "
        for i in (3, 1, 2, 5, 4)
    ]
    (extracted / "LOC_val_solution.csv").write_text("\n".join(rows))
    assert labels(open_path(deep)) == [1, 2, 0, 1, 2]


def test_tiny_imagenet_is_read_as_it_is_distributed(tmp_path):
    touch(tmp_path, *(f"train/{name}/images/{name}_0.JPEG" for name in WNIDS))
    touch(tmp_path, *(f"train/{name}/{name}_boxes.txt" for name in WNIDS))
    touch(tmp_path, *(f"val/images/val_{i}.JPEG" for i in range(3)))
    lines = [f"val_{i}.JPEG\t{WNIDS[2 - i]}\t0\t32\t44\t62\n" for i in range(3)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    collection = open_path(tmp_path)
    assert contents(collection.source("val"))[0].endswith("val_0.JPEG")
    assert collection.source("val").labels.tolist() == [2, 1, 0]
    assert collection.source("train").labels.tolist() == [0, 1, 2]


def test_the_validation_labels_are_those_of_tfds(tmp_path, monkeypatch):
    every = range(1, 50_001)
    monkeypatch.setattr(
        "resnet_jax.data.sources.folders.images_below",
        lambda folder, ignored: list(map(imagenet.VALIDATION_NAME.format, every)),
    )
    (tmp_path / "val").mkdir()
    source = open_path(tmp_path).source("val")
    folder = os.path.join(os.path.dirname(tfds.__file__), "datasets", "imagenet2012")
    with open(os.path.join(folder, "validation_labels.txt")) as file:
        wnids = file.read().split()
    found = [source.class_names[label] for label in source.labels]
    assert found == wnids


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("{0} 0\n{1}", r"val\.txt, line 2 is .*; expected FILE LABEL, such as"),
        ("{0} 3", r"line 1 has the label 3, which is neither .* number from 0 to 2"),
        ("{0} 9{0}", r"line 1 has the label 9ILSVRC"),
        ("{0} " + 5000 * "9", r"line 1 has the label 999"),
        ("{0} n99", r"line 1 has the label n99"),
        ("{0} 0\n{0} 0", r"line 2 names ILSVRC2012_val_00000001.JPEG again, after li"),
        ("no.JPEG 0", r"line 1 names no.JPEG, which .*val lacks: it holds 5 images"),
        ("{0} 0\n{1} 0", r"holds ILSVRC2012_val_00000003\.JPEG, which .*val\.txt does"),
        ("", r"there are 5 images, and the list names 0"),
    ],
)
def test_mistakes_in_a_list_are_named_by_their_line(extracted, lines, sentence):
    names = [imagenet.VALIDATION_NAME.format(i) for i in range(1, 6)]
    (extracted / "val.txt").write_text(lines.format(*names))
    with pytest.raises(UserError, match=sentence):
        open_path(extracted).source("val")


def test_validation_images_that_are_missing_are_counted(extracted):
    shutil.rmtree(extracted / "train")  # so that all classes are known
    with pytest.raises(UserError, match=r"val lacks: it holds 5 images, and .* 50000"):
        open_path(extracted).source("val")
