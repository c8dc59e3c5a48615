"""Protocols as text and as JSON."""

import json

import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.evaluation.protocols import (
    Center,
    MultiScale,
    Stored,
    TenCrop,
    from_json,
    parse,
)

OWN = Center(224, 232, "bicubic")
TEXTS = {
    "center": OWN,
    "center:flip=true": Center(224, 232, "bicubic", flip=True),
    "ten_crop:average=logits": TenCrop(224, 232, "bicubic", average="logits"),
    "ten_crop:size=192,shorter_side=200": TenCrop(192, 200, "bicubic"),
    "multi_scale": MultiScale((224, 256, 384, 480, 640), "bicubic"),
    "multi_scale:shorter_sides=224+300,flip=false,pooling=windows": MultiScale(
        (224, 300), "bicubic", flip=False, pooling="windows"
    ),
    "stored": Stored(),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_json_name_the_same_protocol(text):
    protocol = parse(text, OWN)
    assert protocol == TEXTS[text]
    assert parse(protocol.describe(), Center()) == protocol
    assert from_json(json.loads(json.dumps(protocol.to_json()))) == protocol


def test_the_papers_scales_in_proportion_to_the_net():
    small = parse("multi_scale", Center(56, 64))
    assert small.shorter_sides == (56, 64, 96, 120, 160)
    assert parse("multi_scale:pooling=windows", small).size == 56


FAULTS = {
    "centre": "there is no protocol 'centre': did you mean center?",
    "center:sise=3": "center has no field 'sise'",
    "center:size": "give FIELD=VALUE",
    "center:size=big": "size must be an integer, not 'big'",
    "center:flip=yes": "flip must be true or false",
    "center:size=300": "a shorter side ranges from 300",
    "ten_crop:average=votes": "average must be probabilities or logits",
    "multi_scale:shorter_sides=224,256": "has no field '256'",
    "multi_scale:shorter_sides=a+b": "integers joined by",
    "multi_scale:shorter_sides=99,pooling=windows": "from 224 to 8192 here, not 99",
    "center:size=0": "sizes range from 1 to 8192",
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults_are_named(text):
    with pytest.raises(UserError, match=FAULTS[text].replace("?", r"\?")):
        parse(text, OWN)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "is not a test protocol"),
        ({"kind": "centre"}, "is not a test protocol"),
        ({"kind": "center", "sise": 3}, "is not a test protocol"),
        ({"kind": "center", "size": 0}, "sizes range from 1 to 8192"),
    ],
)
def test_damaged_json_is_refused(content, sentence):
    with pytest.raises(UserError, match=sentence):
        from_json(content)


def test_the_number_of_views():
    image = np.zeros((70, 90, 3), np.uint8)
    for protocol in (
        Stored(flip=True),
        Center(56, 64, flip=True),
        TenCrop(56, 64),
        MultiScale((56, 64)),
    ):
        assert len(protocol.views(image)) == protocol.num_views
