import io
import threading

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from resnet_jax.data import images, partial_jpeg
from resnet_jax.data.crops import Window
from resnet_jax.data.sources import Example
from resnet_jax.errors import UserError

PHOTOGRAPH = load_sample_image("china.jpg")[:203, :317]
needs_library = pytest.mark.skipif(
    partial_jpeg.decoder() is None, reason="no libturbojpeg of version 3 is here"
)


def jpeg(mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(PHOTOGRAPH).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def windows():
    rng = np.random.default_rng(0)
    yield Window(0, 0, 203, 317)
    yield Window(202, 316, 1, 1)
    yield Window(0, 300, 203, 17)
    for _ in range(25):
        height, width = int(rng.integers(1, 204)), int(rng.integers(1, 318))
        top, left = rng.integers(204 - height), rng.integers(318 - width)
        yield Window(int(top), int(left), height, width)


def in_window(data, window, channels=3):
    example = Example(data, 0, "some/file.jpg")
    return images.decode_window(example, channels, lambda *_: window)


@needs_library
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    ("mode", "subsampling"), [("RGB", 0), ("RGB", 1), ("RGB", 2), ("L", 0)]
)
def test_windows_are_those_of_the_whole_image_bit_for_bit(
    mode, subsampling, progressive, channels
):
    data = jpeg(mode, subsampling=subsampling, progressive=progressive, quality=90)
    whole = images.decode(Example(data, 0, ""), channels)
    for window in windows():
        decoder = partial_jpeg.decoder()
        assert decoder.size(data) == (203, 317)
        np.testing.assert_array_equal(
            decoder.window(data, *window, channels), window.of(whole)
        )
        np.testing.assert_array_equal(
            in_window(data, window, channels), window.of(whole)
        )


@needs_library
def test_what_it_does_not_know_is_left_to_others():
    data = jpeg("CMYK")
    assert partial_jpeg.decoder().size(data) is None
    whole = images.decode(Example(data, 0, ""), 3)
    window = Window(3, 5, 40, 50)
    np.testing.assert_array_equal(in_window(data, window), window.of(whole))
    assert partial_jpeg.decoder().size(b"\xff\xd8 no image \xff\xd9") is None


def test_without_the_library_the_whole_image_is_decoded(monkeypatch):
    monkeypatch.setattr(partial_jpeg, "decoder", lambda: None)
    data = jpeg()
    whole = images.decode(Example(data, 0, ""), 3)
    window = Window(3, 5, 40, 50)
    np.testing.assert_array_equal(in_window(data, window), window.of(whole))


def test_broken_files_are_named():
    data = jpeg()
    for broken in (data[:-500], b"\xff\xd8 no image \xff\xd9", data[:2000] + data[-2:]):
        with pytest.raises(UserError, match=r"image some/file\.jpg"):
            in_window(broken, Window(0, 0, 203, 317))


@needs_library
def test_threads_do_not_share_a_decoder():
    found = []

    def work():
        data = jpeg(quality=95)
        whole = images.decode(Example(data, 0, ""), 3)
        for window in windows():
            same = np.array_equal(in_window(data, window), window.of(whole))
            # Kept, so that no later decoder gets the place of one that is gone.
            found.append((same, partial_jpeg.decoder()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * 28
    assert all(same for same, _ in found)
    assert len({id(decoder) for _, decoder in found}) == 4
