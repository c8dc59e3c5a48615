"""Protocols against torch code written from their definitions, on real files."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from resnet_jax.config.schema import DataConfig
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.errors import UserError
from resnet_jax.evaluation import outputs
from resnet_jax.evaluation.outputs import Member, padded_size
from resnet_jax.evaluation.protocols import Center, MultiScale, Stored, TenCrop
from tests.evaluation.reference import (
    SIZE,
    STD,
    Photographs,
    TorchProtocols,
    small_net,
)


@pytest.fixture(scope="module")
def net():
    return small_net()


def log_probs(members, source, **options):
    found = list(outputs.apply(members, source, **options))
    assert sorted(output.index for output in found) == list(range(len(source)))
    return np.stack([o.log_probs for o in sorted(found, key=lambda o: o.index)], 1)


def test_center(net):
    torch_net, source = TorchProtocols(net), Photographs()
    protocol = Center(SIZE, 73, "bicubic")
    found = log_probs([Member(net, protocol)], source)[0]
    for file, values in zip(source.files, found):
        crop = torch_net.views(file, 73, Image.Resampling.BICUBIC)[1][4]
        expected = torch_net.mean_softmax([torch_net.logits(crop)])
        np.testing.assert_allclose(values, expected, atol=1e-5)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_ten_crops(net, average):
    torch_net, source = TorchProtocols(net), Photographs()
    protocol = TenCrop(SIZE, 73, average=average)
    found = log_probs([Member(net, protocol)], source, batch_size=7)[0]
    for file, values in zip(source.files, found):
        crops = torch_net.views(file, 73)[1]
        logits = [torch_net.logits(crop) for crop in crops]
        expected = torch_net.mean_softmax(logits)
        if average == "logits":
            expected = torch_net.torch.cat(logits).mean(0).log_softmax(0).numpy()
        np.testing.assert_allclose(values, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["global", "windows"])
def test_several_scales(net, pooling):
    torch_net, source = TorchProtocols(net), Photographs()
    sides = (64, 73, 110)
    protocol = MultiScale(sides, pooling=pooling, size=SIZE)
    found = log_probs([Member(net, protocol)], source, batch_size=3)[0]
    for file, values in zip(source.files, found):
        probabilities = []
        for side in sides:
            whole = torch_net.views(file, side)[0]
            for view in (whole, whole[:, ::-1]):
                windows = 2 if pooling == "windows" else None
                logits = torch_net.logits(view, windows)
                probabilities.append(logits.softmax(-1).mean(0))
        expected = torch_net.torch.stack(probabilities).mean(0).log().numpy()
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_all_protocols_agree_on_one_view(net):
    square = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    )
    file = io.BytesIO()
    square.save(file, "PNG")
    source = Photographs()
    source.files = [file.getvalue()]
    protocols = [
        Stored(),
        Center(SIZE, SIZE),
        *(
            MultiScale((SIZE,), flip=False, pooling=p, size=SIZE)
            for p in ("global", "windows")
        ),
    ]
    first, *others = log_probs([Member(net, p) for p in protocols], source)
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_change_nothing(net, batch_size):
    members = [Member(net, Center(SIZE, 70)), Member(net, MultiScale((64, 90)))]
    expected = log_probs(members, Photographs(), batch_size=5)
    found = log_probs(members, Photographs(), batch_size=batch_size)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_columns_are_cut_before_the_softmax(net):
    members = [Member(net, Center(SIZE, 70)), Member(net, Center(SIZE, 70), (4, 1))]
    whole, cut = (
        log_probs([members[0]], Photographs()),
        log_probs([members[1]], Photographs()),
    )
    kept = whole[..., [4, 1]]
    np.testing.assert_allclose(
        cut, kept - np.logaddexp.reduce(kept, -1)[..., None], atol=1e-5
    )


def test_broken_images_are_named_and_left_out_or_stop(net):
    source, members = Photographs(broken=[1]), [Member(net, Center(SIZE, 70))]
    faults = []
    found = list(outputs.apply(members, source, on_fault=faults.append))
    assert [output.index for output in found] == [0, 2, 3, 4]
    assert len(faults) == 1
    assert "photo1.jpg" in faults[0]
    with pytest.raises(UserError, match=r"photo1\.jpg cannot be decoded"):
        list(outputs.apply(members, source))


def test_worker_processes_read_the_same(net):
    members = [Member(net, MultiScale((64, 90)))]
    data = DataConfig(num_processes=2, num_threads=1)
    found = log_probs(members, Photographs(), data=data)
    np.testing.assert_array_equal(found, log_probs(members, Photographs()))


def test_stored_images_of_several_sizes_are_refused(net):
    with pytest.raises(
        UserError, match=r"photo1\.jpg is 70x131 and the first is 90x70"
    ):
        list(outputs.apply([Member(net, Stored())], Photographs()))


def test_grey_data_do_not_fit_a_net_for_colours(net):
    source = Photographs()
    source.files = [np.zeros((64, 64, 1), np.uint8)]
    with pytest.raises(UserError, match="has 1 channels and the net takes 3"):
        list(outputs.apply([Member(net, Stored())], source))


def test_a_mean_image_of_another_size_becomes_its_mean_colour(net):
    image = (
        np.random.default_rng(0).normal(0.5, 0.1, (SIZE, SIZE, 3)).astype(np.float32)
    )
    ones = np.ones_like(image)
    exact = dataclasses.replace(net, statistics=PixelStatistics(image, ones))
    color = PixelStatistics(image.mean((0, 1), keepdims=True), ones[:1, :1])
    mean = dataclasses.replace(net, statistics=color)
    source, larger = Photographs(), MultiScale((SIZE + 6,))
    np.testing.assert_allclose(
        log_probs([Member(exact, larger)], source),
        log_probs([Member(mean, larger)], source),
        atol=1e-6,
    )
    crops = [log_probs([Member(n, Center(SIZE, 70))], source) for n in (exact, mean)]
    assert np.abs(crops[0] - crops[1]).max() > 1e-4


def test_whole_images_are_padded_to_few_sizes():
    sizes = {padded_size(h, 224) for h in range(224, 2240)}
    assert len(sizes) == 8
    for height, width in [(224, 224), (224, 341), (1000, 230), (7, 3000)]:
        padded = padded_size(height, width)
        assert padded[0] >= height
        assert padded[1] >= width
        assert all(side % 32 == 0 for side in padded)
    assert padded_size(224, 224) == (224, 224)


def test_whole_images_of_the_mean_images_size_use_its_pixels(net):
    rng = np.random.default_rng(0)
    mean = rng.uniform(0.2, 0.8, (40, 40, 3)).astype(np.float32)
    statistics = PixelStatistics(mean, STD[None, None])
    net = dataclasses.replace(net, statistics=statistics)
    whole = Member(net, MultiScale((40,), flip=False))
    found = log_probs([whole, Member(net, Center(40, 40))], Photographs())
    square = 2  # of SIDES: the others have another size, and use the mean colour
    np.testing.assert_allclose(found[0, square], found[1, square], atol=1e-5)


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 7)])
def test_a_line_of_pixels_has_a_padded_size(size):
    padded = padded_size(*size)
    assert all(0 <= p - s < p for s, p in zip(size, padded, strict=True))
