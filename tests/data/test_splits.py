import itertools
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds

from resnet_jax.data.sources.arrays import ArraySource, array_collection
from resnet_jax.data.sources.base import Description
from resnet_jax.data.sources.splits import parse, refuse_overlap
from resnet_jax.errors import UserError


def description(**counts):
    return Description("shapes", ("disc", "ring"), 1, counts)


def tfds_positions(expression, counts):
    """(split, start, stop) of each part, as tfds's own reader has them."""
    infos = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[count],
            num_bytes=0,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir="/nowhere", dataset_name="shapes", filetype_suffix="tfrecord"
            ),
        )
        for name, count in counts.items()
    ]
    info_of = {info.name: info for info in infos}
    spec = tfds.core.splits.AbstractSplit.from_spec(expression)
    return [
        (part.splitname, part.from_ or 0, counts[part.splitname])
        if part.to is None
        else (part.splitname, part.from_ or 0, part.to)
        for part in spec.to_absolute(info_of)
    ]


BOUNDS = ("", "0", "3", "7", "-2", "-7", "10%", "50%", "33.3%", "66.6%", "-25%", "90%")


@pytest.mark.parametrize("count", [7, 10, 25, 101, 50_000, 1_281_167])
def test_parts_and_their_rounding_are_those_of_tfds(count):
    counts = {"train": count}
    compared = 0
    for low, high in itertools.product(BOUNDS, BOUNDS):
        units = {bound.endswith("%") for bound in (low, high) if bound}
        if not (low or high) or len(units) > 1:
            continue
        expression = f"train[{low}:{high}]"
        ((_, start, stop),) = tfds_positions(expression, counts)
        if start >= stop:
            with pytest.raises(UserError, match=r"is empty"):
                parse(expression, description(**counts))
            continue
        (part,) = parse(expression, description(**counts))
        assert (part.start, part.stop) == (start, stop), expression
        compared += 1
    assert compared > 25


@pytest.mark.parametrize("percent", range(1, 100))
def test_percentages_are_those_of_tfds_and_leave_nothing_out(percent):
    for count in (60, 99, 250, 1437, 1_281_167):
        counts = {"train": count}
        (below,) = parse(f"train[:{percent}%]", description(**counts))
        (above,) = parse(f"train[{percent}%:]", description(**counts))
        assert (below.start, below.stop, above.stop) == (0, above.start, count)
        expected = [("train", above.start, count)]
        assert tfds_positions(f"train[{percent}%:]", counts) == expected


def test_sums_of_parts_are_those_of_tfds():
    counts = {"train": 1437, "test": 360}
    for expression in (
        "train[:10%]+train[20%:30%]",
        "train + test",
        "test[-5%:]+train[100:200]",
    ):
        parts = parse(expression, description(**counts))
        found = [(part.split, part.start, part.stop) for part in parts]
        assert found == tfds_positions(expression, counts)


@pytest.mark.parametrize(
    ("expression", "sentence"),
    [
        ("", "cannot be read; expected SPLIT, SPLIT[:90%]"),
        ("train[:90%", "cannot be read"),
        ("train+", "cannot be read"),
        ("train[50]", "cannot be read"),
        ("train[1:2:3]", "cannot be read"),
        ("train[:]", "cannot be read"),
        ("train[a:b]", "cannot be read"),
        ("train[:1.5]", "cannot be read"),
        ("train[:1e3]", "cannot be read"),
        ("train[10:50%]", "mixes examples and percentages"),
        ("train[:101]", "bound 101, but train has only 100 examples"),
        ("train[:200%]", "only 100 examples"),
        ("train[-101:]", "only 100 examples"),
        ("train[20:20]", "is empty: train has 100 examples"),
        ("train[30%:20%]", "goes from 30 up to 20"),
        ("train[:0.1%]", "goes from 0 up to 0"),
        ("tain", "shapes has no split 'tain'; its splits are train, test"),
        ("train[:60]+train[50:]", "names examples of train twice"),
    ],
)
def test_what_cannot_be_meant_is_refused(expression, sentence):
    with pytest.raises(UserError) as error:
        parse(expression, description(train=100, test=10))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_an_example_serves_one_end():
    described = description(train=100, test=10)
    refuse_overlap(described, {"a": "train[:90%]", "b": "train[90%:]", "c": "test"})
    with pytest.raises(UserError, match=r"a=train and b=train\[90%:\] share 10 exampl"):
        refuse_overlap(described, {"a": "train", "b": "train[90%:]"})
    with pytest.raises(UserError, match=r"b=train\+test and c=test share 10 examples"):
        refuse_overlap(described, {"b": "train+test", "c": "test"})


def collection():
    def numbered(count, first):
        images = np.arange(first, first + count, dtype=np.uint8).reshape(-1, 1, 1, 1)
        return ArraySource(images, np.zeros(count, int), ["disc"], "numbered")

    sources = {"train": numbered(20, 0), "test": numbered(5, 100)}
    return array_collection("numbered", "arrays", sources)


def test_parts_give_the_examples_in_order():
    source = collection().source("test[3:]+train[:10%]+train[50%:60%]")
    for opened in (source, pickle.loads(pickle.dumps(source))):
        found = [int(opened[i].image.item()) for i in range(len(opened))]
        assert found == [103, 104, 0, 1, 10, 11]
        for beyond in (-1, 6):
            with pytest.raises(IndexError):
                opened[beyond]
    assert (source.class_names, source.channels) == (["disc"], 1)
