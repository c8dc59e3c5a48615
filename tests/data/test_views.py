import importlib

import cv2
import numpy as np
import pytest
from PIL import Image

from resnet_jax.config.schema import INTERPOLATIONS
from resnet_jax.data import views
from resnet_jax.errors import UserError

FILTERS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


def photograph(height, width, channels):
    rng = np.random.default_rng(height * width)
    grain = rng.normal(0, 1, (height, width, channels)).astype(np.float32)
    smooth = cv2.GaussianBlur(grain, (0, 0), 5).reshape(grain.shape)
    return np.clip(smooth * 400 + grain * 8 + 120, 0, 255).astype(np.uint8)


def pillow(image):
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def array(image):
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


# Wide, high, square, tiny, smaller than the crop, of odd and even room around it, with
# longer sides whose fraction is cut off or, in floating point, on the edge of a whole.
SHAPES = [
    (375, 500, 3),
    (500, 333, 3),
    (120, 120, 3),
    (56, 68, 3),
    (68, 56, 1),
    (33, 500, 3),
    (161, 97, 1),
    (256, 257, 3),
    (257, 256, 3),
    (77, 110, 3),
    (256, 256, 3),
]
CROPS = [(256, 224), (232, 224), (97, 96), (96, 95), (64, 64), (105, 100)]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("side", "size"), CROPS)
def test_bytes_are_those_of_torchvision(shape, side, size, interpolation):
    from tests.torch_peers import import_peer

    import_peer("torchvision")
    transforms = importlib.import_module("torchvision.transforms")
    image = photograph(*shape)
    mode = transforms.InterpolationMode(interpolation)
    resized = transforms.Resize(side, mode)(pillow(image))
    np.testing.assert_array_equal(
        views.full_image(image, side, interpolation), array(resized)
    )
    np.testing.assert_array_equal(
        views.center_crop(image, side, size, interpolation),
        array(transforms.CenterCrop(size)(resized)),
    )
    np.testing.assert_array_equal(
        views.ten_crop(image, side, size, interpolation),
        [array(crop) for crop in transforms.TenCrop(size)(resized)],
    )


# (shape, shorter side, size) -> (width, height) resized and (left, top) of the middle:
# worked out by hand. 168.85 is cut to 168; 58.5 goes to 58, 73.5 to 74, 0.5 to 0.
BY_HAND = [
    ((375, 500, 3), 256, 224, (341, 256), (58, 16)),
    ((500, 333, 3), 256, 224, (256, 384), (16, 80)),
    ((232, 371, 1), 232, 224, (371, 232), (74, 4)),
    ((371, 225, 1), 225, 224, (225, 371), (0, 74)),
    ((56, 68, 3), 226, 223, (274, 226), (26, 2)),
    ((68, 56, 3), 224, 224, (224, 272), (0, 24)),
    ((10, 10, 3), 101, 100, (101, 101), (0, 0)),
    ((100, 103, 3), 100, 100, (103, 100), (2, 0)),
    ((103, 61, 3), 100, 99, (100, 168), (0, 34)),
]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("shape", "side", "size", "resized", "corner"), BY_HAND)
def test_bytes_are_those_of_pillow(shape, side, size, resized, corner, interpolation):
    image = photograph(*shape)
    whole = pillow(image).resize(resized, FILTERS[interpolation])
    full = views.full_image(image, side, interpolation)
    np.testing.assert_array_equal(full, array(whole))
    left, top = corner
    middle = whole.crop((left, top, left + size, top + size))
    np.testing.assert_array_equal(
        views.center_crop(image, side, size, interpolation), array(middle)
    )
    width, height = resized
    places = [
        (0, 0),
        (width - size, 0),
        (0, height - size),
        (width - size, height - size),
        corner,
    ]
    mirror = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    crops = [
        array(picture.crop((x, y, x + size, y + size)))
        for picture in (whole, mirror)
        for x, y in places
    ]
    np.testing.assert_array_equal(
        views.ten_crop(image, side, size, interpolation), crops
    )


def test_ten_crops_mirror_each_other():
    crops = views.ten_crop(photograph(90, 131, 3), 64, 48)
    for one, other in [(5, 1), (6, 0), (7, 3), (8, 2)]:
        np.testing.assert_array_equal(crops[one], crops[other][:, ::-1])
    # 93 columns: the middle of 48 begins at 22 in the image and in its mirror image.
    resized = views.full_image(photograph(90, 131, 3), 64)
    assert resized.shape == (64, 93, 3)
    np.testing.assert_array_equal(crops[9], resized[8:56, 23:71][:, ::-1])
    np.testing.assert_array_equal(crops[4], resized[8:56, 22:70])


def test_the_papers_scales_keep_the_aspect():
    image = photograph(56, 68, 3)
    shapes = [views.full_image(image, s).shape for s in views.FULL_IMAGE_SCALES]
    assert shapes == [
        (224, 272, 3),
        (256, 310, 3),
        (384, 466, 3),
        (480, 582, 3),
        (640, 777, 3),
    ]


def test_shrinking_averages_over_all_pixels():
    # Stripes finer than the new pixels become grey; without antialiasing they stay.
    stripes = np.zeros((256, 256, 1), np.uint8)
    stripes[:, ::2] = 200
    for interpolation in INTERPOLATIONS:
        small = views.full_image(stripes, 32, interpolation)[:, 2:-2]
        assert np.abs(small.astype(int) - 100).max() <= 2


@pytest.mark.parametrize("channels", [1, 3])
def test_results_are_contiguous_and_the_input_stays(channels):
    image = photograph(70, 80, channels)[:, ::-1]
    copy = image.copy()
    for result in (
        views.full_image(image, 64),
        views.center_crop(image, 64, 56),
        views.ten_crop(image, 64, 56),
        views.full_image(image, 70),
    ):
        assert result.dtype == np.uint8
        assert result.flags.c_contiguous
        assert result.shape[-1] == channels
        assert not np.shares_memory(result, image)
    np.testing.assert_array_equal(image, copy)


@pytest.mark.parametrize("crop", [views.center_crop, views.ten_crop])
def test_a_crop_larger_than_the_image_is_refused(crop):
    with pytest.raises(UserError, match="at least 224, not 223"):
        crop(photograph(300, 400, 3), 223, 224)


def test_an_unknown_interpolation_is_refused():
    with pytest.raises(UserError, match="did you mean bicubic"):
        views.center_crop(photograph(30, 40, 3), 20, 20, "bicubik")


def test_other_images_are_refused():
    with pytest.raises(UserError, match=r"expected uint8 \(h, w, 1 or 3\)"):
        views.full_image(np.zeros((8, 8, 4), np.uint8), 8)
