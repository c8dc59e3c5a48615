"""What the figures draw, read off their axes."""

import math

import numpy as np
import pytest

from resnet_jax.analysis.plots import (
    Curves,
    Depths,
    Layers,
    error_by_depth,
    error_by_setting,
    error_curves,
    gradient_norms_figure,
    layer_responses_figure,
    training_and_test_error,
)
from resnet_jax.errors import UserError


def rows(errors, every=100):
    """(training, test) errors; None: not evaluated there."""
    return [
        {"step": every * index, "train_error": train}
        | ({} if test is None else {"test_error": test})
        for index, (train, test) in enumerate(errors, start=1)
    ]


def lines(axes):
    return [line.get_xydata().tolist() for line in axes.get_lines()]


def labels(axes):
    """The names at the lines' ends with their heights."""
    return {text.get_text(): text.xyann[1] for text in axes.texts}


FIRST = rows([(0.5, None), (0.25, 0.375)])
SECOND = rows([(0.75, None), (0.125, 0.125), (0.0, 0.0)])


def test_figure_1_has_training_errors_left_and_test_errors_right():
    nets = [Curves("plain-20", [FIRST], "plain"), Curves("plain-56", [SECOND], "plain")]
    figure = training_and_test_error(nets, "a title")
    left, right = figure.axes
    assert lines(left) == [[[100, 50], [200, 25]], [[100, 75], [200, 12.5], [300, 0]]]
    assert lines(right) == [[[200, 37.5]], [[200, 12.5], [300, 0]]]
    assert left.get_ylabel() == "training error (%)"
    assert right.get_ylabel() == "test error (%)"
    assert left.get_xlim() == right.get_xlim() == (0, 300)
    assert figure.get_suptitle() == "a title"
    for axes in figure.axes:
        assert labels(axes).keys() == {"plain-20", "plain-56"}


def test_seeds_are_a_mean_and_a_band_where_all_of_them_measured():
    figure = training_and_test_error([Curves("ResNet-8", [FIRST, SECOND])])
    left, right = figure.axes
    assert lines(left) == [[[100, 62.5], [200, 18.75]]]
    assert lines(right) == [[[200, 25]]]
    (band,) = left.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(100, 50), (100, 75), (200, 12.5), (200, 25)}


def test_thin_dashes_are_training_and_bold_lines_are_test():
    figure = error_curves({"plain": [Curves("plain-8", [FIRST], "plain")]})
    training, test = figure.axes[0].get_lines()
    assert training.get_xydata().tolist() == [[100, 50], [200, 25]]
    assert training.is_dashed()
    assert not test.is_dashed()
    assert test.get_linewidth() > 2 * training.get_linewidth()
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == ["training", "test"]
    assert [line.is_dashed() for line in key.get_lines()] == [True, False]


def luminance(color):
    return float(np.dot(color[:3], [0.2126, 0.7152, 0.0722]))


def test_families_differ_in_hue_and_depths_in_lightness_in_all_panels_alike():
    nets = {
        name: Curves(name, [FIRST], family)
        for name, family in (
            ("plain-8", "plain"),
            ("plain-20", "plain"),
            ("ResNet-8", "residual"),
            ("ResNet-20", "residual"),
            ("ResNet-56", "residual"),
        )
    }
    plain = [nets["plain-8"], nets["plain-20"]]
    residual = [nets["ResNet-8"], nets["ResNet-20"], nets["ResNet-56"]]
    panels = {"plain": plain, "residual": residual, "deep": residual[2:]}
    first, second, third = error_curves(panels).axes
    assert [axes.get_title() for axes in (first, second, third)] == list(panels)
    colors = [
        [line.get_color() for line in axes.get_lines() if not line.is_dashed()]
        for axes in (first, second, third)
    ]
    assert all(red > blue for red, _, blue, _ in colors[0])
    assert all(blue > red for red, _, blue, _ in colors[1])
    assert colors[2] == colors[1][2:]
    for shades in colors[:2]:
        steps = -np.diff([luminance(color) for color in shades])
        assert (steps > 0.08).all()


@pytest.mark.parametrize(
    ("every", "lasts", "x", "y", "unit"),
    [
        (32_000, [(0.02, 0.0697), (0.07, 0.13)], 6.4, (0, 20), " (1e4)"),
        (300_000, [(0.31, 0.279), (0.3, 0.25)], 60, (20, 60), " (1e4)"),
        (32_000, [(0.02, 0.07), (0.5, 0.6)], 6.4, (0, 100), " (1e4)"),
        (2000, [(0.02, 0.05)], 4, (0, 10), " (1e3)"),
        (300, [(0.3, 0.25)], 600, (0, 60), ""),
        (300, [(0.0, 0.002)], 600, (0, 1), ""),
    ],
)
def test_axes_are_the_papers_where_runs_are_as_long(every, lasts, x, y, unit):
    nets = [
        Curves(f"net {index}", [rows([(0.9, 0.9), last], every)])
        for index, last in enumerate(lasts)
    ]
    for axes in error_curves({"panel": nets, "first": nets[:1]}).axes:
        assert axes.get_xlim() == (0, x)
        assert axes.get_ylim() == y
        assert axes.get_xlabel() == f"iterations{unit}"


def test_names_stand_at_the_ends_of_their_lines_and_not_on_each_other():
    lasts = {"a": 0.050, "b": 0.051, "c": 0.049, "far": 0.15, "failed": 0.9}
    nets = [Curves(name, [rows([(0.0, last)], 64_000)]) for name, last in lasts.items()]
    heights = labels(error_curves({"": nets}).axes[0])
    gaps = np.diff([heights[name] for name in ("c", "a", "b", "far", "failed")])
    assert (gaps > 0.05).all()
    # The axis ends at 100 %.
    assert heights["far"] == pytest.approx(0.15, abs=0.02)
    assert heights["failed"] == pytest.approx(0.9)
    assert heights["a"] == pytest.approx(0.05, abs=0.02)


def test_figure_7_has_layers_in_order_and_sorted():
    nets = [Layers("plain-4", [1.5, 2.0, 1.0], "plain"), Layers("ResNet-3", [0.5, 1])]
    figure = layer_responses_figure(nets, "responses")
    top, bottom = figure.axes
    assert lines(top) == [[[1, 1.5], [2, 2], [3, 1]], [[1, 0.5], [2, 1]]]
    assert lines(bottom) == [[[1, 2], [2, 1.5], [3, 1]], [[1, 1], [2, 0.5]]]
    plain, residual = top.get_lines()
    assert (plain.is_dashed(), residual.is_dashed()) == (True, False)
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == ["plain-4", "ResNet-3"]


def test_gradients_that_vanished_leave_a_gap_on_the_logarithmic_axis():
    figure = gradient_norms_figure(
        {"": [Layers("plain-3", [0.0, 1e-20, 0.1], "plain")]}
    )
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert math.isnan(lines(axes)[0][0][1])
    assert lines(axes)[0][1:] == [[2, 1e-20], [3, 0.1]]


def bars(axes):
    """The ends of all bars, from the first drawn on."""
    return [
        segment.tolist()
        for collection in axes.collections
        for segment in collection.get_segments()
        if len(segment)
    ]


def test_depths_have_means_and_sample_deviations():
    plain = Depths("plain", {56: [0.13], 20: [0.09, 0.11]}, "plain")
    residual = Depths("residual", {20: [0.09], 110: [0.0625]})
    figure = error_by_depth([plain, residual])
    (axes,) = figure.axes
    drawn = [line for line in lines(axes) if len(line) == 2]
    np.testing.assert_allclose(drawn[0], [[20, 10], [56, 13]])
    assert [[20, 9], [110, 6.25]] in drawn
    # Two numbers 2 % apart: a sample deviation of the root of 2 %.
    (bar,) = [bar for bar in bars(axes) if not np.isnan(bar).any()]
    np.testing.assert_allclose(bar, [[20, 10 - 2**0.5], [20, 10 + 2**0.5]])
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert ticks == ["20", "56", "110"]
    assert axes.get_xscale() == "linear"
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == ["plain", "residual"]


def test_depths_far_apart_are_on_a_logarithmic_axis():
    family = Depths("residual", {20: [0.09], 110: [0.06], 1202: [0.08]})
    assert error_by_depth([family]).axes[0].get_xscale() == "log"


def test_settings_stand_from_top_to_bottom_with_their_runs():
    figure = error_by_setting({"A": [0.07, 0.09], "a single one": [0.13]})
    (axes,) = figure.axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["A (n = 2)", "a single one (n = 1)"]
    bottom, top = axes.get_ylim()
    assert bottom > top
    runs = [line for line in axes.get_lines() if line.get_marker() == "."]
    np.testing.assert_allclose(runs[0].get_xdata(), [7, 9])
    (means,) = [line for line in axes.get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(means.get_xydata(), [[8, 0], [13, 1]])


def test_errors_say_what_cannot_be_drawn():
    with pytest.raises(UserError, match="ResNet-8 have no test_error at a common step"):
        error_curves({"": [Curves("ResNet-8", [rows([(0.5, None)])])]})
    with pytest.raises(UserError, match="plain, residual, other, not 'wide'"):
        gradient_norms_figure({"": [Layers("net", [1.0], "wide")]})
    with pytest.raises(UserError, match="no net to draw"):
        layer_responses_figure([])
