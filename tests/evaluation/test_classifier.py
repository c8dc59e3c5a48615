"""The classifier against torch, on the pictures of a user."""

import dataclasses
import io

import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import resnet_jax
from resnet_jax.data.sources.imagenet import class_ids
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.errors import UserError
from resnet_jax.evaluation import classifier as classifiers
from resnet_jax.evaluation import outputs
from resnet_jax.evaluation.classifier import Classifier, Prediction
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.evaluation.outputs import Member
from resnet_jax.evaluation.protocols import Center, MultiScale, Stored, TenCrop
from resnet_jax.models import ResNet, create_model
from resnet_jax.models.highway import HighwayNet
from tests.evaluation.reference import (
    CLASSES,
    MEAN,
    SIDES,
    SIZE,
    STD,
    Photographs,
    TorchProtocols,
    small_net,
)
from tests.models.reference import random_variables

NAMES = ("tench", "goldfish", "great white shark", "tiger shark")


@pytest.fixture(scope="module")
def trained():
    return small_net(protocol=Center(SIZE, 70), class_names=class_ids()[:CLASSES])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    paths = []
    for number, file in enumerate(Photographs().files):
        paths.append(folder / f"{number}.jpg")
        paths[-1].write_bytes(file)
    return paths


def test_against_torch(trained, photographs):
    torch_net = TorchProtocols(trained)
    found = Classifier(trained)(photographs, top=3)
    for path, prediction in zip(photographs, found, strict=True):
        crop = torch_net.views(path.read_bytes(), 70)[1][4]
        probabilities = np.exp(torch_net.mean_softmax([torch_net.logits(crop)]))
        assert prediction.image == str(path)
        assert prediction.classes == tuple(np.argsort(-probabilities)[:3])
        expected = np.sort(probabilities)[::-1][:3]
        np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-5)
        for index, name in zip(prediction.classes, prediction.names, strict=True):
            assert NAMES[index] == name if index < len(NAMES) else name


def test_a_prediction_reads_as_a_line():
    prediction = Prediction("a.jpg", (1, 0), ("goldfish", "tench"), (0.876, 0.1))
    assert str(prediction) == "a.jpg: goldfish 87.6 %, tench 10.0 %"


def test_every_kind_of_picture_gives_the_same(trained):
    classifier = Classifier(trained)
    pixels = np.asarray(Image.open(io.BytesIO(Photographs().files[0])))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    pictures = [pixels, Image.fromarray(pixels), Image.open(file), pixels]
    found = classifier(pictures)
    assert [p.image for p in found] == [f"image {n}" for n in range(4)]
    assert len({(p.classes, p.probabilities) for p in found}) == 1
    # One picture, an iterator, a stack, and no picture.
    for other in (pixels, iter([pixels]), pixels[None], Image.open(file)):
        (one,) = classifier(other)
        np.testing.assert_allclose(one.probabilities, found[0].probabilities, 1e-5)
    assert classifier([]) == []
    assert classifier(iter([])) == []


def test_colours_and_grey(trained):
    model = ResNet((1, 1, 1, 1), width=8, num_classes=3)
    variables = random_variables(model, np.zeros((1, SIZE, SIZE, 1), np.float32))
    half = np.full((1, 1, 1), 0.5, np.float32)
    statistics = PixelStatistics(half, half)
    protocol = Center(SIZE, SIZE)
    of_grey = TrainedNet("", "", {}, model, variables, statistics, protocol, None)
    photo = Image.open(io.BytesIO(Photographs().files[0]))
    grey = photo.convert("L")
    for tested in (trained, of_grey):
        first, *others = Classifier(tested)(
            [grey, np.asarray(grey), grey.convert("RGBA"), grey.convert("LA")]
        )
        for other in others:
            assert other.probabilities == first.probabilities
    (color,) = Classifier(of_grey)(photo)
    (same,) = Classifier(of_grey)(grey)
    assert color.probabilities == same.probabilities
    assert set(same.names) == {"0", "1", "2"}  # names are unknown


@pytest.mark.parametrize("protocol", ["ten_crop", "multi_scale:shorter_sides=64+100"])
def test_the_order_is_kept_and_broken_pictures_are_left_out(
    trained, photographs, tmp_path, protocol
):
    classifier = Classifier(trained, protocol)
    assert classifier.protocol in (TenCrop(SIZE, 70), MultiScale((64, 100), size=SIZE))
    expected = classifier(photographs)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"nothing")
    mixed = [broken, *photographs[:2], broken, *photographs[2:], *photographs, broken]
    faults = []
    found = list(classifier.stream(mixed, on_fault=faults.append))
    raw = [
        o.index
        for o in outputs.apply([Member(trained, classifier.protocol)], Photographs())
    ]
    assert (raw == sorted(raw)) == (protocol == "ten_crop")
    names = [prediction.image for prediction in expected * 2]
    assert [prediction.image for prediction in found] == names
    np.testing.assert_allclose(
        [p.probabilities for p in found],
        [p.probabilities for p in expected * 2],
        atol=1e-5,
    )
    assert len(faults) == 3
    with pytest.raises(UserError, match=r"broken\.jpg cannot be decoded"):
        classifier(mixed)


def test_an_iterator_is_read_in_parts(trained, monkeypatch):
    monkeypatch.setattr(classifiers, "_AT_ONCE", 2)
    taken = []
    files = (
        taken.append(file) or Image.open(io.BytesIO(file))
        for file in Photographs().files
    )
    stream = Classifier(trained).stream(files)
    assert next(stream).image == "image 0"
    assert len(taken) == 2
    assert [prediction.image for prediction in stream] == [
        f"image {number}" for number in range(1, len(SIDES))
    ]


def test_a_later_call_does_not_compile(trained, photographs):
    traces = []

    class Counted(ResNet):
        @nn.nowrap
        def apply(self, *args, **kwargs):
            traces.append(1)
            return super().apply(*args, **kwargs)

    model = Counted((1, 1, 1, 1), width=8, num_classes=CLASSES)
    classifier = Classifier(dataclasses.replace(trained, model=model))
    classifier(photographs[:3])
    assert len(traces) == 1
    for number in (3, 4, 2):
        classifier(photographs[:number])
    # Few pictures are padded to a power of two, and here to eight devices.
    assert len(traces) == 1


def test_images_of_a_net_without_resizing_get_the_size_of_its_mean_image(trained):
    image = np.full((SIZE, SIZE, 3), 0.5, np.float32)
    statistics = PixelStatistics(image, np.ones_like(image[:1, :1]))
    stored = dataclasses.replace(trained, protocol=Stored(), statistics=statistics)
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    large = pixels.repeat(2, 0).repeat(2, 1)
    classifier = Classifier(stored)
    as_stored, resized = (classifier(picture)[0] for picture in (pixels, large))
    expected = Classifier(stored, Stored())(pixels)[0]
    assert as_stored.probabilities == expected.probabilities
    shrunk = Image.fromarray(large).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    assert resized.probabilities == classifier(shrunk)[0].probabilities
    # Without a mean image the size is unknown.
    color = PixelStatistics(MEAN[None, None], STD[None, None])
    unknown = Classifier(dataclasses.replace(stored, statistics=color))
    with pytest.raises(UserError, match="give a protocol that resizes them"):
        unknown([pixels, large])


def test_from_pretrained(tmp_path, photographs):
    model = create_model("cifar_resnet8", num_classes=3)
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    file = tmp_path / "net.safetensors"
    resnet_jax.save_weights(file, variables, model)
    classifier = resnet_jax.Classifier.from_pretrained(
        file, model="cifar_resnet8", mean=MEAN, std=STD, protocol=Center(32, 32)
    )
    assert classifier.net.checksum == resnet_jax.load_net(
        file, model="cifar_resnet8", mean=MEAN, std=STD
    ).checksum  # fmt: skip
    assert len(classifier(photographs[0])[0].classes) == 3


def test_views_of_a_size_that_a_net_cannot_take(trained):
    model = HighwayNet(widths=(4, 4, 4), highway_layers=(1, 1, 1), num_classes=3)
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    net = dataclasses.replace(
        trained, name="highway", model=model, variables=variables, class_names=None
    )
    sentence = "highway cannot take views of 2x2 pixels.*at least 4x4"
    with pytest.raises(UserError, match=sentence):
        Classifier(net, "center:size=2,shorter_side=2")(np.zeros((5, 5), np.uint8))


def test_mistakes_get_one_sentence(trained, photographs):
    classifier = Classifier(trained)
    misnamed = dataclasses.replace(trained, class_names=("one",))
    without = dataclasses.replace(trained, model=ResNet((1,), num_classes=None))
    for call, sentence in (
        (lambda: classifier(photographs, top=0), "at least 1, not 0"),
        (lambda: classifier(3), "got int: give a path, a Pillow image, an array"),
        (lambda: classifier([photographs[0], None]), "image 1 is NoneType: give"),
        (lambda: classifier(photographs[0].parent), "photographs0 cannot be read"),
        (lambda: Classifier(without), "has no classifier"),
        (lambda: Classifier(misnamed), "names 1 classes, but its net has 7"),
        (lambda: Classifier(trained, "tencrop"), "did you mean ten_crop"),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            call()
        assert "\n" not in str(error.value)
