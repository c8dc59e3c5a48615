import cv2
import numpy as np
import pytest

from resnet_jax.data import images
from resnet_jax.data.sources import Example
from resnet_jax.errors import UserError

RNG = np.random.default_rng(0)
SMOOTH = cv2.GaussianBlur(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8), (0, 0), 3)


def encoded(suffix, image, *options):
    return cv2.imencode(
        suffix, image[..., ::-1] if image.ndim == 3 else image, options
    )[1].tobytes()


def decoded(data, channels=3):
    return images.decode(Example(data, 0, "some/file.jpg"), channels)


def test_png_comes_back_as_it_was():
    np.testing.assert_array_equal(decoded(encoded(".png", SMOOTH)), SMOOTH)


def test_grey_becomes_colour_and_colour_grey():
    grey = SMOOTH[..., 0]
    color = decoded(encoded(".png", grey))
    np.testing.assert_array_equal(color, np.repeat(grey[..., None], 3, 2))
    back = decoded(encoded(".png", SMOOTH), channels=1)
    luminance = SMOOTH @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(back[..., 0], luminance, atol=1)


def test_alpha_and_sixteen_bits_are_reduced():
    alpha = np.dstack([SMOOTH[..., ::-1], np.full(SMOOTH.shape[:2], 255, np.uint8)])
    data = cv2.imencode(".png", alpha)[1].tobytes()
    np.testing.assert_array_equal(decoded(data), SMOOTH)
    deep = SMOOTH.astype(np.uint16) * 257
    assert np.abs(decoded(encoded(".png", deep)).astype(int) - SMOOTH).max() <= 1


def test_jpeg_is_near():
    data = encoded(".jpg", SMOOTH, cv2.IMWRITE_JPEG_QUALITY, 95)
    assert np.abs(decoded(data).astype(int) - SMOOTH).mean() < 3


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_broken_image_is_named(suffix, share):
    data = encoded(suffix, SMOOTH)
    with pytest.raises(UserError, match=r"image some/file\.jpg"):
        decoded(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"image some/file\.jpg cannot be decoded"):
        decoded(b"this is no image")


def test_a_little_after_a_jpegs_end_is_no_fault():
    assert decoded(encoded(".jpg", SMOOTH) + b"\0" * 100).shape == SMOOTH.shape


def test_shorter_side_is_exact_and_aspect_kept():
    assert images.resize_shorter_side(SMOOTH, 20).shape == (20, 30, 3)
    assert images.resize_shorter_side(SMOOTH[:, :37], 101).shape == (109, 101, 3)


def test_shrinking_averages_areas():
    half = images.resize_shorter_side(SMOOTH, 20)
    mean = SMOOTH.reshape(20, 2, 30, 2, 3).mean((1, 3))
    assert np.abs(half - mean).max() <= 1


def test_center_crop_is_in_the_middle():
    index = np.arange(7 * 9).reshape(7, 9, 1)
    np.testing.assert_array_equal(images.center_crop(index, 3), index[2:5, 3:6])


def test_scale_augmentation_draws_sides_and_places_uniformly():
    # A picture of its own coordinates tells where each window was cut.
    ramp = np.arange(0, 256, 4, np.uint8)
    rows, columns = np.meshgrid(ramp, ramp, indexing="ij")
    image = np.dstack([rows, columns, rows])
    rng = np.random.default_rng(1)
    crops = [images.scale_and_crop(image, 32, (32, 64), rng) for _ in range(1000)]
    assert all(crop.shape == (32, 32, 3) for crop in crops)
    down = np.array([int(crop[-1, 5, 0]) - int(crop[0, 5, 0]) for crop in crops])
    right = np.array([int(crop[5, -1, 1]) - int(crop[5, 0, 1]) for crop in crops])
    assert np.abs(down - right).max() <= 4  # the aspect is kept
    # At side s, 31 steps of a window cross 31 * 256 / s of the picture's brightness.
    sides = 31 * 256 / down
    assert sides.min() < 33.5
    assert sides.max() > 62.5
    # Uniform in 32 .. 64: mean 48, deviation 9.5, of 1000 draws 0.3.
    assert abs(sides.mean() - 48) < 1.5
    room = 1 - 32 / sides
    wide = room > 0.2
    for first in (0, 1):
        corner = np.array([int(crop[0, 0, first]) / 256 for crop in crops])
        place = corner[wide] / room[wide]  # in 0 .. 1, uniform: deviation 0.29
        assert abs(place.mean() - 0.5) < 0.05
        assert abs(place.std() - 0.29) < 0.03
