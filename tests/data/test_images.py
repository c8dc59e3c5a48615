import contextlib
import io
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from resnet_jax.data import images
from resnet_jax.data.crops import Window
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


def by_pillow(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


COLOR = Image.fromarray(SMOOTH)
ALPHA = Image.fromarray(np.dstack([SMOOTH, SMOOTH[..., 0]]))
PALETTE = COLOR.quantize(32)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # a quarter turn

FORMATS = {
    "bmp": by_pillow(COLOR, "BMP"),
    "bmp alpha": by_pillow(ALPHA, "BMP"),
    "bmp palette": by_pillow(PALETTE, "BMP"),
    "gif": by_pillow(PALETTE, "GIF"),
    "gif transparent": by_pillow(PALETTE, "GIF", transparency=3),
    "gif film": by_pillow(
        PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]
    ),
    "jpeg": by_pillow(COLOR, "JPEG"),
    "jpeg turned": by_pillow(COLOR, "JPEG", exif=TURNED),
    "png": by_pillow(COLOR, "PNG"),
    "png alpha": by_pillow(ALPHA, "PNG"),
    "png film": by_pillow(
        ALPHA, "PNG", save_all=True, append_images=[ALPHA.rotate(180)]
    ),
    "png transparent": by_pillow(PALETTE, "PNG", transparency=3),
    "png turned": by_pillow(COLOR, "PNG", exif=TURNED),
    "ppm": by_pillow(COLOR, "PPM"),
    "pbm": by_pillow(COLOR.convert("1"), "PPM"),
    "pgm 15": b"P5 3 1 15\n\x00\x03\x0f",
    "tiff": by_pillow(COLOR, "TIFF"),
    "tiff alpha": by_pillow(ALPHA, "TIFF"),
    "tiff alpha, lzw": by_pillow(ALPHA, "TIFF", compression="tiff_lzw"),
    "tiff turned": by_pillow(COLOR, "TIFF", tiffinfo={274: 6}),
    "webp": by_pillow(COLOR, "WEBP", lossless=True),
    "webp alpha": by_pillow(ALPHA, "WEBP", lossless=True, exact=True),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_pillows_pixels_without_alpha_and_rotation(name):
    data = FORMATS[name]
    opened = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(decoded(data), np.asarray(opened.convert("RGB")))
    grey = np.asarray(opened.convert("L"), int)[..., None]
    # A JPEG stores its luminance.
    tolerance = 4 if "jpeg" in name else 1
    np.testing.assert_allclose(decoded(data, 1).astype(int), grey, atol=tolerance)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_of_16_bits_the_upper_eight_remain(kind, channels):
    deep = RNG.integers(0, 2**16, (5, 7), dtype=np.uint16)
    found = decoded(by_pillow(Image.fromarray(deep), kind), channels)
    expected = np.repeat((deep >> 8)[..., None], channels, 2)
    np.testing.assert_array_equal(found, expected)


def test_premultiplied_and_32_bits():
    # Colours times alpha are divided by it again; numbers without a range are refused.
    associated = by_pillow(ALPHA, "TIFF", tiffinfo={338: 1})
    expected = Image.open(io.BytesIO(associated)).convert("RGBA").convert("RGB")
    np.testing.assert_array_equal(decoded(associated), expected)
    for dtype in (np.float32, np.int32):
        with pytest.raises(UserError, match=r"its pixels have 32 bits; replace"):
            decoded(by_pillow(Image.fromarray(SMOOTH[..., 0].astype(dtype)), "TIFF"))


@pytest.mark.parametrize("name", FORMATS)
def test_more_pixels_than_the_limit_are_refused_in_every_format(name):
    example = Example(FORMATS[name], 0, "some/file.jpg")
    pixels = 3 if name == "pgm 15" else 40 * 60
    assert images.decode(example, 3, pixels).size == 3 * pixels
    refused = r"some/file\.jpg cannot be decoded: it states .* max_image_pixels="
    with pytest.raises(UserError, match=rf"{refused}{pixels - 1}"):
        images.decode(example, 3, pixels - 1)
    with pytest.raises(UserError, match=refused):
        images.decode_window(example, 3, lambda *size: Window(0, 0, 1, 1), pixels - 1)


HEADER_LIES = """
import resource, struct, sys, zlib
from resnet_jax.data import images
from resnet_jax.data.sources import Example
from resnet_jax.errors import UserError
from tests.data.test_images import FORMATS
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)

def lies(big):
    jpeg, png, bmp = FORMATS["jpeg"], FORMATS["png"], FORMATS["bmp"]
    place = jpeg.index(b"\\xff\\xc0") + 5
    yield jpeg[:place] + struct.pack(">HH", big, big) + jpeg[place + 4 :]
    header = b"IHDR" + struct.pack(">II", big, big) + png[24:29]
    yield png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    yield png[:33] + struct.pack(">I", 0xF0000000) + png[37:]  # a chunk's length
    yield bmp[:18] + struct.pack("<II", big, big) + bmp[26:]
    yield b"P6 %d %d 255\\n" % (big, big) + b"abc"
    gif, tiff, webp = FORMATS["gif"], FORMATS["tiff"], FORMATS["webp alpha"]
    if big > 9_000:  # otherwise a small image on a large canvas is right
        yield gif[:6] + struct.pack("<HH", big, big) + gif[10:]
    for tag in (256, 257):
        place = tiff.index(struct.pack("<HHI", tag, 4, 1)) + 8
        tiff = tiff[:place] + struct.pack("<I", big) + tiff[place + 4 :]
    yield tiff
    yield webp[:21] + b"\\xff" * 4 + webp[25:]
    for kind, data in FORMATS.items():
        if kind != "pgm 15" and "film" not in kind:
            yield data[: len(data) // 2]

for big in (65_000, 9_000):  # beyond the limit, and within it
    for number, data in enumerate(lies(big)):
        try:
            images.decode(Example(data, 0, f"lie {number}"), 3)
        except UserError as error:
            print(error)
"""


def test_a_header_that_lies_takes_no_memory():
    done = subprocess.run(
        [sys.executable, "-c", HEADER_LIES], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * (7 + len(FORMATS) - 3) + 1, lines
    assert all(re.match(r"image lie \d+ cannot be decoded: ", line) for line in lines)


@pytest.mark.parametrize("after", [b"\0" * 8192, b"\0\0\0\x18ftypmp42" + bytes(9000)])
@pytest.mark.parametrize("progressive", [False, True])
def test_much_after_a_jpegs_end_is_no_fault(after, progressive):
    thumbnail = jpeg_by_pillow(SMOOTH[:8, :8])
    exif = Image.Exif()
    exif[0x010E] = thumbnail.decode("latin-1")  # an end within the header
    data = jpeg_by_pillow(SMOOTH, exif=exif, progressive=progressive)
    example = Example(data + after, 0, "some/file.jpg")
    np.testing.assert_array_equal(images.decode(example, 3), decoded(data))
    top = images.decode_window(example, 3, lambda h, w: Window(0, 0, 8, w))
    np.testing.assert_array_equal(top, decoded(data)[:8])
    for end in (len(data) - 2, len(data) // 2, len(data) - 300):
        cut = Example(data[:end] + after, 0, "some/file.jpg")
        with pytest.raises(UserError, match=r"some/file\.jpg cannot be decoded"):
            images.decode(cut, 3)
        with pytest.raises(UserError, match=r"some/file\.jpg cannot be decoded"):
            images.decode_window(cut, 3, lambda h, w: Window(0, 0, 8, w))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_file_is_refused_or_gives_all_pixels(name):
    data, whole = FORMATS[name], decoded(FORMATS[name])
    for end in {*(len(data) * np.arange(1, 20) // 20), len(data) - 1}:
        with contextlib.suppress(UserError):
            np.testing.assert_array_equal(decoded(data[:end]), whole)


def test_damage_in_a_film_of_png_is_noticed():
    data = bytearray(FORMATS["png film"])
    data[data.index(b"IDAT") + 100] ^= 0xFF
    with pytest.raises(UserError, match=r"it is damaged"):
        decoded(bytes(data))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_damage_is_a_sentence():
    for name, data in FORMATS.items():
        for _ in range(20):
            damaged = bytearray(data)
            for place in RNG.integers(len(data), size=3):
                damaged[place] = RNG.integers(256)
            with contextlib.suppress(UserError):
                assert decoded(bytes(damaged)).dtype == np.uint8, name
