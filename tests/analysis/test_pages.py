import base64
import io
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from resnet_jax.analysis import pages


@pytest.mark.parametrize(
    ("text", "is_number"),
    [
        *[(text, True) for text in ("7", "8.75", "64,000", "99.1 %", "19 of 360")],
        *[(text, True) for text in ("3 min 05 s", "2 h 10 min", "6.43 (6.61 ± 0.16)")],
        *[(text, False) for text in ("2 cores, a CPU", "1 x NVIDIA H200", "3d", "")],
    ],
)
def test_numbers_are_right_aligned(text, is_number):
    assert ('class="number"' in pages.grid(["a"], [[text]])) == is_number


def test_text_is_no_html():
    wild = '<b>&"\x1b[31m'
    safe = "&lt;b&gt;&amp;&quot;\\x1b[31m"
    picture = pages.picture(np.zeros((2, 2, 3), np.uint8), wild)
    for part in (
        *(pages.heading(wild), pages.paragraph(wild), pages.facts({wild: wild})),
        *(pages.grid([wild], [[wild]]), pages.folded(wild), picture),
    ):
        assert safe in part
        assert "<b>" not in part


@pytest.mark.parametrize(("shape", "size"), [((20, 64), 64), ((300, 500), 160)])
def test_small_pictures_keep_their_pixels_and_large_ones_shrink(shape, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    part = pages.pictures([pixels], ["a caption"])
    kind, data = re.search(r"data:image/(\w+);base64,([^\"]+)", part).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert max(image.size) == size
    if size == 64:
        assert kind == "png"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_figures_have_no_background():
    """So that a dark page shows through, and inverts the lines alone."""
    figure = Figure(figsize=(10, 4))
    figure.subplots().plot([1, 2])
    part = pages.svg(figure)
    assert 'style="min-width: 6.0in"' in part
    assert "fill: #ffffff" not in part.partition('id="line2d')[0]
