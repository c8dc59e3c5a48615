import math

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from resnet_jax.data import crops
from resnet_jax.data.crops import Window

RNG = np.random.default_rng(0)


# Two photographs of 427 x 640 pixels come with scikit-learn, as JPEG files.
PHOTOGRAPHS = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
PHOTOGRAPH = PHOTOGRAPHS[0]


def resized(image, window, size):
    out = np.empty((size, size, image.shape[2]), np.uint8)
    crops.resize(window.of(image), out)
    return out


def by_pillow(image, window, size):
    top, left, height, width = window
    cut = np.ascontiguousarray(image[top : top + height, left : left + width])
    cut = cut[..., 0] if cut.shape[2] == 1 else cut
    small = Image.fromarray(cut).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(small).reshape(size, size, image.shape[2])


@pytest.mark.parametrize("factor", [0.4, 1.0, 1.2, 1.33, 1.5, 1.9, 2.3, 3.1])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_near_pillows_at_every_factor(factor, channels):
    extent = round(120 * factor)
    window = Window(31, 77, extent, round(extent * 1.2))
    differences = []
    for photograph in PHOTOGRAPHS:
        image = photograph[..., :channels]
        ours = resized(image, window, 120).astype(int)
        differences.append(np.abs(ours - by_pillow(image, window, 120)).mean())
    assert np.mean(differences) < 2.0


def test_random_crops_are_within_one_of_255_of_pillows_on_average():
    rng = np.random.default_rng(3)
    draws = {
        "scale": lambda: crops.scale_window(427, 640, 224, (256, 480), rng),
        "inception": lambda: crops.inception_window(
            427, 640, (0.08, 1), (3 / 4, 4 / 3), rng
        ),
    }
    for draw in draws.values():
        differences = []
        for photograph in PHOTOGRAPHS * 20:
            window = draw()
            ours = resized(photograph, window, 224).astype(int)
            differences.append(np.abs(ours - by_pillow(photograph, window, 224)).mean())
        assert np.mean(differences) < 1.0


def test_a_window_of_the_outputs_size_is_a_copy():
    window = Window(11, 13, 40, 40)
    np.testing.assert_array_equal(
        resized(PHOTOGRAPH, window, 40), PHOTOGRAPH[11:51, 13:53]
    )


def test_nothing_aliases_where_it_shrinks():
    stripes = np.zeros((224, 224, 3), np.uint8)
    stripes[:, ::2] = 255
    for size in (100, 150):
        middle = resized(stripes, Window(0, 0, 224, 224), size)[:, 5:-5]
        assert middle.std() < 40  # the stripes' own is 127


@pytest.mark.parametrize(("height", "width"), [(68, 56), (2400, 1800), (300, 500)])
def test_scale_windows_are_squares_of_uniform_sides_and_places(height, width):
    rng = np.random.default_rng(1)
    windows = [
        crops.scale_window(height, width, 224, (256, 480), rng) for _ in range(2000)
    ]
    extents = np.array([window.height for window in windows])
    assert all(window.width == window.height for window in windows)
    assert all(window.top + window.height <= height for window in windows)
    assert all(window.left + window.width <= width for window in windows)
    # Uniform sides in 256 .. 480: mean 368, deviation 65, of 2,000 draws 1.5.
    sides = 224 * min(height, width) / extents
    rounding = 480 / min(height, width)
    assert abs(sides.mean() - 368) < 6 + rounding
    assert abs(sides.std() - 65) < 4 + rounding
    if width > height:
        places = [window.left / (width - window.width) for window in windows]
        assert abs(np.mean(places) - 0.5) < 0.03
        assert abs(np.std(places) - 0.289) < 0.02


def test_inception_windows_have_uniform_areas_and_log_uniform_aspects():
    rng = np.random.default_rng(2)
    # In a large square nearly every small window fits, so few are drawn again.
    windows = np.array(
        [
            crops.inception_window(1000, 1000, (0.1, 0.5), (3 / 4, 4 / 3), rng)
            for _ in range(4000)
        ]
    )
    areas = windows[:, 2] * windows[:, 3] / 1e6
    aspects = np.log(windows[:, 3] / windows[:, 2])
    assert abs(areas.mean() - 0.3) < 0.01
    assert abs(areas.std() - 0.4 / math.sqrt(12)) < 0.005
    assert abs(aspects.mean()) < 0.015
    assert abs(aspects.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.008
    places = windows[:, 0] / (1000 - windows[:, 2])
    assert abs(places.mean() - 0.5) < 0.02
    assert abs(places.std() - 0.289) < 0.01


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (10, 400, Window(0, 193, 10, 13)),  # as wide as 4:3 allows
        (400, 10, Window(193, 0, 13, 10)),
    ],
)
def test_where_no_window_fits_the_middle_is_taken(height, width, expected):
    window = crops.inception_window(
        height, width, (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)
    )
    assert window == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_mirror_in_place(channels):
    image = RNG.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    expected = image[:, ::-1].copy()
    crops.mirror(image)
    np.testing.assert_array_equal(image, expected)
