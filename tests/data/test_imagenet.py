import importlib.util
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from resnet_jax.data.sources import imagenet, readable_names

TFDS = Path(tfds.__file__).parent / "datasets" / "imagenet2012"


def test_the_classes_are_in_the_order_of_tfds_and_sorted():
    ids = imagenet.class_ids()
    assert list(ids) == (TFDS / "labels.txt").read_text().split()
    assert list(ids) == sorted(set(ids))
    assert len(ids) == 1000


@pytest.mark.parametrize(
    ("label", "name"),
    [
        (0, "tench"),
        (1, "goldfish"),
        (134, "crane (bird)"),
        (207, "golden retriever"),
        (281, "tabby"),
        (291, "lion"),
        (388, "giant panda"),
        (517, "crane (machine)"),
        (638, "maillot"),
        (639, "maillot, tank suit"),
        (817, "sports car"),
        (954, "banana"),
        (999, "toilet tissue"),
    ],
)
def test_well_known_labels(label, name):
    assert readable_names(imagenet.class_ids())[label] == name


def torchvision_names():
    """Torchvision's module of names alone: some builds cannot be imported whole."""
    found = importlib.util.find_spec("torchvision")
    if found is None:
        pytest.skip("torchvision is not installed")
    file = Path(found.origin).parent / "models" / "_meta.py"
    spec = importlib.util.spec_from_file_location("torchvision_names", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_are_those_of_torchvision():
    meta = torchvision_names()
    ours = readable_names(imagenet.class_ids())
    theirs = meta._IMAGENET_CATEGORIES
    # Torchvision tells the second of two equal names apart in its own way.
    own = {134: "crane bird", 517: "crane", 639: "maillot tank suit"}
    for label, (mine, other) in enumerate(zip(ours, theirs)):
        if label in own:
            assert other == own[label]
        else:
            assert mine.lower() == other.lower()


def test_names_are_unique_and_other_classes_keep_theirs():
    names = readable_names(imagenet.class_ids())
    assert len(set(names)) == 1000
    assert readable_names(["ant", "n01440764"]) == ("ant", "tench")
