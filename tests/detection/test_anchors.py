"""Anchors against numbers published with other implementations."""

import numpy as np
import pytest

from resnet_jax.detection.anchors import Anchors


def test_torchvisions_cell():
    """What its AnchorGenerator makes of the paper's sizes: rounded, ratio by ratio."""
    expected = [
        [-91, -45, 91, 45], [-181, -91, 181, 91], [-362, -181, 362, 181],
        [-64, -64, 64, 64], [-128, -128, 128, 128], [-256, -256, 256, 256],
        [-45, -91, 45, 91], [-91, -181, 91, 181], [-181, -362, 181, 362],
    ]  # fmt: skip
    cell = Anchors(rounded=True).cell()
    assert cell.dtype == np.float32
    np.testing.assert_array_equal(cell, expected)


def test_detectron2s_cells():
    """From its tests/modeling/test_anchor_generator.py, with an offset of 0."""
    anchors = Anchors(sizes=(32, 64), ratios=(0.25, 1, 4), stride=4, order="size")
    expected = [
        [-32, -8, 32, 8], [-16, -16, 16, 16], [-8, -32, 8, 32],
        [-64, -16, 64, 16], [-32, -32, 32, 32], [-16, -64, 16, 64],
        [-28, -8, 36, 8], [-12, -16, 20, 16], [-4, -32, 12, 32],
        [-60, -16, 68, 16], [-28, -32, 36, 32], [-12, -64, 20, 64],
    ]  # fmt: skip
    np.testing.assert_array_equal(anchors.grid(1, 2), expected)


def test_areas_and_ratios_are_exact_without_rounding():
    anchors = Anchors(sizes=(32, 64, 128, 256, 512), order="size")
    assert anchors.per_cell == 15
    sides = anchors.cell()[:, 2:] * 2
    sizes = np.repeat(anchors.sizes, 3)
    np.testing.assert_allclose(sides.prod(-1), sizes**2.0, rtol=1e-6)
    np.testing.assert_allclose(
        sides[:, 1] / sides[:, 0], np.tile(anchors.ratios, 5), rtol=1e-6
    )


def test_the_grid_goes_row_by_row():
    anchors = Anchors(sizes=(2,), ratios=(1, 4), stride=10)
    grid = anchors.grid(3, 4).reshape(3, 4, 2, 4)
    assert grid.dtype == np.float32
    np.testing.assert_array_equal(grid[2, 1, 0], [9, 19, 11, 21])
    np.testing.assert_array_equal(grid[2, 1, 1], [9.5, 18, 10.5, 22])
    np.testing.assert_array_equal(grid[0, 3, 0], [29, -1, 31, 1])


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="'area'"):
        Anchors(order="area")
