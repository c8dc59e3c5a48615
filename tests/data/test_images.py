import io

import cv2
import numpy as np
import pytest
from PIL import Image

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


def jpeg_by_pillow(image, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_pillows_bit_for_bit(mode, progressive, subsampling):
    data = jpeg_by_pillow(
        SMOOTH, mode, progressive=progressive, subsampling=subsampling, quality=90
    )
    for channels, converted in ((3, "RGB"), (1, "L")):
        expected = Image.open(io.BytesIO(data))
        if mode == "RGB" and channels == 1:
            # The stored luminance itself, not one computed from the colours.
            expected.draft("L", expected.size)
        expected = np.asarray(expected.convert(converted)).reshape(40, 60, channels)
        np.testing.assert_array_equal(decoded(data, channels), expected)


@pytest.mark.parametrize("size", [(68, 56), (2400, 1600), (1, 1), (3, 500)])
def test_sizes_from_tiny_to_huge(size):
    image = cv2.resize(SMOOTH, size)
    assert decoded(encoded(".jpg", image)).shape == (size[1], size[0], 3)
    np.testing.assert_array_equal(decoded(encoded(".png", image)), image)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp"])
def test_the_bytes_say_the_format_and_not_the_name(suffix):
    # The name of every example here ends with .jpg.
    image = decoded(encoded(suffix, SMOOTH, cv2.IMWRITE_WEBP_QUALITY, 101))
    np.testing.assert_array_equal(image, SMOOTH)


def test_rotation_in_exif_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = jpeg_by_pillow(SMOOTH, exif=exif)
    assert decoded(data).shape == SMOOTH.shape


def test_a_harmless_warning_is_no_fault():
    data = jpeg_by_pillow(SMOOTH)
    strange = data[:-2] + b"\0\0\0" + data[-2:]  # bytes before the end marker
    np.testing.assert_array_equal(decoded(strange), decoded(data))


def test_lost_data_in_the_middle_is_a_fault():
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = jpeg_by_pillow(noise, quality=95)
    half = len(data) // 2
    for lost in (data[:half] + data[-2:], data[:half] + b"\xff\xd0" + data[half + 2 :]):
        with pytest.raises(UserError, match=r"some/file\.jpg cannot be decoded"):
            decoded(lost)
