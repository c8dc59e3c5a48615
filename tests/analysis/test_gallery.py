"""Galleries: which pixels and captions they draw."""

import numpy as np
import pytest

from resnet_jax.analysis.gallery import gallery
from resnet_jax.errors import UserError

RNG = np.random.default_rng(0)


def test_pictures_and_captions():
    grey = RNG.integers(0, 256, (8, 8, 1), np.uint8)
    flat = RNG.integers(0, 256, (8, 6), np.uint8)
    colour = RNG.integers(0, 256, (120, 90, 3), np.uint8)
    figure = gallery(
        [grey, flat, colour], [3, "$x$", "cat"], correct=[1, 0, 1], columns=2
    )
    drawn = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(figure.axes) == 4
    for found, expected in zip(drawn, (grey[..., 0], flat, colour), strict=True):
        np.testing.assert_array_equal(found, expected)
    titles = [axes.title for axes in figure.axes]
    assert [title.get_text() for title in titles] == ["3", r"\$x\$", "cat", ""]
    assert [title.get_weight() == "bold" for title in titles[:3]] == [
        False,
        True,
        False,
    ]
    assert titles[1].get_color() != titles[0].get_color()
    figure.draw_without_rendering()


def test_an_array_of_pictures_without_captions():
    figure = gallery(RNG.integers(0, 256, (3, 8, 8, 3), np.uint8))
    assert [bool(axes.images) for axes in figure.axes] == [True] * 3


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "no pictures"),
        (2, {"captions": ["a"]}, "2 pictures need 2 captions, not 1"),
        (2, {"correct": [True] * 3}, "2 pictures need 2 marks in correct, not 3"),
        (2, {"dtype": np.float32}, "uint8"),
    ],
)
def test_wrong_arguments(count, options, message):
    dtype = options.pop("dtype", np.uint8)
    with pytest.raises(UserError, match=message):
        gallery(np.zeros((count, 4, 4), dtype), **options)
