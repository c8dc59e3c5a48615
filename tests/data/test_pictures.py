"""Pictures of a user against Pillow."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from resnet_jax.data.pictures import Pictures, read_picture
from resnet_jax.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_pictures_are_turned_upright(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    options = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(PIXELS).save(path, kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(path))
    assert (upright.size == (5, 9)) == (orientation > 4)
    tolerance = 3 if kind == "jpeg" else 0  # another decoder
    for picture in (path, Image.open(path)):
        found = read_picture(picture, 3, "turned.jpg")
        difference = np.asarray(upright, int) - found
        assert np.abs(difference).max() <= tolerance
        assert found.flags.c_contiguous


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_all_modes_are_converted(mode, channels):
    image = Image.fromarray(PIXELS)
    if mode == "I;16":
        image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) << 8)
        expected = Image.fromarray(PIXELS[..., 0])
    else:
        expected = image = image.convert(mode)
    expected = np.asarray(expected.convert("L" if channels == 1 else "RGB"))
    found = read_picture(image, channels, "x")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected.reshape(5, 9, channels))


def test_arrays():
    grey = PIXELS[..., 0]
    opaque = np.dstack([PIXELS, grey])
    same = np.repeat(grey[..., None], 3, 2)
    expected = np.asarray(Image.fromarray(PIXELS).convert("L"))[..., None]
    for array, channels, pixels in (
        (grey, 1, grey[..., None]),
        (grey, 3, same),
        (grey[..., None], 3, same),
        (PIXELS[:, ::-1], 3, PIXELS[:, ::-1]),
        (opaque, 3, PIXELS),
        (PIXELS, 1, expected),
        (opaque, 1, expected),
    ):
        np.testing.assert_array_equal(read_picture(array, channels, "x"), pixels)


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        (PIXELS / 255, r"image 7 is an array of float64: give uint8 pixels from 0"),
        (PIXELS.transpose(2, 0, 1), r"of the shape \(3, 5, 9\): give \(h, w\), or"),
        (PIXELS[:0], r"of the shape \(0, 9, 3\)"),
        (np.uint8(3), r"of the shape \(\)"),
        (b"bytes", "image 7 is bytes: give a path, a Pillow image or an array"),
        (Image.new("F", (2, 2)), "image 7 cannot be decoded: its pixels have 32 bits"),
        (Image.new("RGB", (0, 2)), "image 7 has no pixels"),
        ("/nowhere/a.jpg", "image /nowhere/a.jpg cannot be read: No such file"),
    ],
)
def test_other_objects_are_refused_by_name(picture, sentence):
    source = Pictures([PIXELS, picture], 3, start=6)
    assert source[0].name == "image 6"
    with pytest.raises(UserError, match=sentence):
        source[1]
    assert source.broken == {1}


def test_a_file_that_pillow_reads_late_and_a_line_of_pixels():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    late = Image.open(io.BytesIO(file.getvalue()[:-60]))
    line = np.zeros((1, 60_000), np.uint8)
    source = Pictures([late, line], 3, shorter_sides=[256])
    with pytest.raises(UserError, match="image 0 cannot be decoded: it is damaged"):
        source[0]
    with pytest.raises(UserError, match="image 1 is 60000 x 1: resized to a shorter"):
        source[1]
