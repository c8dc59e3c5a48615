"""Labels of a data set as classes of a net."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from resnet_jax.data.sources.imagenet import class_ids
from resnet_jax.errors import UserError
from resnet_jax.evaluation.labels import (
    match_classes,
    read_class_map,
    read_label_sets,
    validation_number,
)


def a_net(names, count=None):
    names = names if names is None else tuple(names)
    size = count or len(names)
    return SimpleNamespace(source="net", class_names=names, num_classes=size)


def matched(net, data, **options):
    found = match_classes([net], data, **options)
    return found.class_names, found.columns[0], found.targets.tolist()


def test_the_same_names_and_another_order():
    assert matched(a_net("abc"), "abc") == (tuple("abc"), None, [0, 1, 2])
    assert matched(a_net("abc"), "cab") == (tuple("abc"), None, [2, 0, 1])


def test_some_of_the_classes_are_cut_or_not():
    net = a_net("abcde")
    assert matched(net, "db") == (("b", "d"), (1, 3), [1, 0])
    whole = match_classes([net], "db", all_classes=True)
    assert whole.class_names == tuple("abcde")
    assert whole.columns == (None,)
    assert whole.targets.tolist() == [3, 1]
    assert "2 of the net's 5 classes" in match_classes([net], "db").note


def test_folders_of_numbers_are_numbers():
    # ImageNet-V2's folders are sorted as strings.
    folders = sorted(map(str, range(1000)))
    net = a_net(class_ids())
    assert matched(net, folders)[2] == [int(name) for name in folders]
    # But if the net's own classes are called so, they are names.
    assert matched(a_net(["3", "2", "1"]), ["1", "2", "3"])[2] == [2, 1, 0]


def test_readable_names():
    net = a_net(class_ids())
    assert match_classes(
        [net], ["tench", "goldfish"], all_classes=True
    ).targets.tolist() == [0, 1]


def test_a_net_without_names_takes_as_many_classes_in_their_order():
    assert matched(a_net(None, 3), "xyz")[2] == [0, 1, 2]
    with pytest.raises(UserError, match=r"4 classes without names.*give --class-map"):
        match_classes([a_net(None, 4)], "xyz")


def test_an_unknown_class_is_named():
    with pytest.raises(UserError, match="no class 'cats': did you mean cat"):
        match_classes([a_net(["cat", "dog"])], ["cats", "dog"])


def test_nets_with_classes_in_different_orders():
    nets = [a_net("abcd"), a_net("dcba"), a_net("abcd")]
    assert match_classes(nets, "abcd").columns == (None, (3, 2, 1, 0), None)
    assert match_classes(nets, "ca").columns == ((0, 2), (3, 1), (0, 2))
    # A net without names has the order of the data's classes, in any company.
    nets = [a_net(None, 3), a_net("cab"), a_net(None, 3)]
    found = match_classes(nets, "abc")
    assert found.class_names == tuple("cab")
    assert found.columns == ((2, 0, 1), None, (2, 0, 1))
    assert found.targets.tolist() == [1, 2, 0]
    by_number = match_classes([a_net(None, 3), a_net("cab")], "02")
    assert by_number.columns == ((0, 2), (0, 2))
    with pytest.raises(UserError, match="give --class-map"):
        match_classes([a_net("abcd"), a_net(None, 4)], "abc")
    with pytest.raises(UserError, match="give nets with the same classes"):
        match_classes([a_net("abcd"), a_net("abc")], "abc")


@pytest.mark.parametrize("form", ["json", "lines"])
def test_a_class_map(tmp_path, form):
    file, pairs = tmp_path / "map", {"sofa": "couch", "dog": "1"}
    lines = "\n".join(" ".join(pair) for pair in pairs.items())
    file.write_text(lines if form == "lines" else json.dumps(pairs))
    class_map = read_class_map(file)
    assert class_map == pairs
    net = a_net(["couch", "hound", "other"])
    assert match_classes([net], ["dog", "sofa"], class_map).targets.tolist() == [1, 0]
    with pytest.raises(UserError, match="lacks the class 'cat'"):
        match_classes([net], ["cat"], class_map)


def test_wrong_class_maps_are_refused(tmp_path):
    file = tmp_path / "map"
    for text, sentence in {"a b c": "line 1", "{1": "not JSON"}.items():
        file.write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_class_map(file)


def test_files_of_several_labels_per_image(tmp_path):
    file = tmp_path / "real.json"
    file.write_text("[[1], [], [0, 2]]")
    assert read_label_sets(file, 3) == [(1,), (), (0, 2)]
    for text, sentence in {
        "[3]": "item 0",
        "[[3]]": "from 0 to 2",
        "{}": "not a list",
    }.items():
        file.write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_label_sets(file, 3)
    assert validation_number("/val/x/ILSVRC2012_val_00000293.JPEG") == 293
    with pytest.raises(UserError, match="not an ImageNet validation image"):
        validation_number("photo.jpg")


def test_targets_are_integers_of_32_bits():
    assert match_classes([a_net("ab")], "ba").targets.dtype == np.int32


def test_a_thousand_classes_are_not_all_printed():
    with pytest.raises(UserError, match=r"\(1,000 in all\)") as found:
        match_classes([a_net(class_ids())], ["val"])
    assert len(str(found.value)) < 200
