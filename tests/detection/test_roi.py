"""RoIAlign and RoI pooling against the compiled kernels' loops, and torchvision."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.detection.roi import roi_align, roi_pool

SIZE = np.array([9, 13], np.int32)
ROIS = np.array(
    [
        [20, 30, 120, 90],
        [0, 0, 208, 144],  # the whole map
        [33.3, 47.1, 35.2, 48.4],  # tiny
        [60, 60, 60, 60],  # no area
        [190, 100, 208, 144],  # in the corner
        [200, 140, 260, 200],  # partly outside
        [-70, -30, 40, 50],
        [400, 400, 500, 500],  # outside
        [100, 20, 108, 150],
    ],
    np.float32,
)


def feature_map(height=9, width=13, channels=5):
    rng = np.random.default_rng(0)
    return rng.normal(size=(height, width, channels)).astype(np.float32)


def align_by_loops(features, rois, out, sampling, aligned, stride=16):
    """The CPU kernel of torchvision and Detectron2, sample by sample, in float64."""
    height, width, channels = features.shape
    result = np.zeros((len(rois), out, out, channels))

    def value(y, x):
        if y < -1 or y > height or x < -1 or x > width:
            return 0
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        dy, dx = y - top, x - left
        upper = (1 - dx) * features[top, left] + dx * features[top, right]
        lower = (1 - dx) * features[bottom, left] + dx * features[bottom, right]
        return (1 - dy) * upper + dy * lower

    for r, i, j in np.ndindex(len(rois), out, out):
        x1, y1, x2, y2 = rois[r].astype(np.float64) / stride - (0.5 if aligned else 0)
        w, h = x2 - x1, y2 - y1
        if not aligned:
            w, h = max(w, 1), max(h, 1)
        for a, b in np.ndindex(sampling, sampling):
            y = y1 + (i + (a + 0.5) / sampling) * h / out
            x = x1 + (j + (b + 0.5) / sampling) * w / out
            result[r, i, j] += value(y, x)
    return result / sampling**2


def pool_by_loops(features, rois, out, stride=16):
    """Caffe's layer, bin by bin."""
    height, width, channels = features.shape
    result = np.zeros((len(rois), out, out, channels), np.float32)
    for r, i, j in np.ndindex(len(rois), out, out):
        x1, y1, x2, y2 = (
            int(np.copysign(int(abs(v) / stride + 0.5), v)) for v in rois[r]
        )
        h, w = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
        top, bottom = y1 + int(i * h / out), y1 + int(np.ceil((i + 1) * h / out))
        left, right = x1 + int(j * w / out), x1 + int(np.ceil((j + 1) * w / out))
        rows, columns = (
            np.clip([top, bottom], 0, height),
            np.clip([left, right], 0, width),
        )
        cells = features[slice(*rows), slice(*columns)]
        if cells.size:
            result[r, i, j] = cells.max((0, 1))
    return result


@pytest.mark.parametrize("shape", [(9, 13), (13, 9)])
@pytest.mark.parametrize(("out", "sampling"), [(7, 2), (3, 1), (4, 3)])
@pytest.mark.parametrize("aligned", [True, False])
def test_align_equals_the_kernels_loops(shape, out, sampling, aligned):
    features = feature_map(*shape)
    options = {"out": out, "sampling": sampling, "aligned": aligned}
    ours = roi_align(features, ROIS, np.int32(shape), **options)
    expected = align_by_loops(features, ROIS, **options)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("aligned", [True, False])
def test_align_equals_torchvision(aligned):
    """Its Python form clamps all samples, so regions stay within a cell of the map."""
    from tests.torch_peers import import_peer, torch

    import_peer("torchvision.ops")
    peer = sys.modules["torchvision.ops.roi_align"]._roi_align.__wrapped__
    rois = np.concatenate([ROIS[[0, 1, 2, 3, 4, 8]], [[-7, -7, 50, 60]]])
    boxes = np.concatenate([np.zeros((len(rois), 1)), rois], 1).astype(np.float32)
    if not aligned:  # cells lie half a cell further to the right
        boxes[5, 4] = 140
    features = feature_map()
    maps = torch.tensor(features).permute(2, 0, 1)[None]
    theirs = peer(maps, torch.tensor(boxes), 1 / 16, 7, 7, 2, aligned)
    ours = roi_align(features, boxes[:, 1:], SIZE, out=7, aligned=aligned)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("fill", [1e4, np.nan])
def test_padding_has_no_effect(pool, fill):
    function = functools.partial(roi_align, out=7)
    if pool:
        function = functools.partial(roi_pool, stride=16, out=7)
    features = feature_map()
    padded = np.full((12, 20, 5), fill, np.float32)
    padded[:9, :13] = features
    alone, in_batch = (function(x, ROIS, SIZE) for x in (features, padded))
    # Of maps this small, XLA:CPU adds products in an order that depends on the width.
    np.testing.assert_allclose(in_batch, alone, atol=0 if pool else 5e-7)

    gradient = jax.grad(lambda x: function(x, ROIS, SIZE).sum())
    inner, outer = gradient(features), gradient(padded)
    np.testing.assert_allclose(outer[:9, :13], inner, atol=1e-5)
    outer = outer.at[:9, :13].set(0)
    assert not outer.any()


def test_align_has_the_gradient_of_its_transpose():
    """It is linear in the map: <align(x), y> = <x, gradient(y)>."""
    features = jnp.asarray(feature_map())
    output, gradient = jax.vjp(lambda x: roi_align(x, ROIS, SIZE, out=5), features)
    cotangent = np.random.default_rng(1).normal(size=output.shape).astype(np.float32)
    (transposed,) = gradient(jnp.asarray(cotangent))
    np.testing.assert_allclose(
        (output * cotangent).sum(), (features * transposed).sum(), rtol=1e-4
    )


def test_align_of_bfloat16_maps():
    features = feature_map()
    narrow = jnp.asarray(features, jnp.bfloat16)
    ours = roi_align(narrow, ROIS, SIZE, out=7)
    assert ours.dtype == jnp.bfloat16
    expected = roi_align(narrow.astype(jnp.float32), ROIS, SIZE, out=7)
    np.testing.assert_allclose(ours.astype(np.float32), expected, atol=3e-2)


def test_memory_of_align():
    """Of the products, only the smaller one (R, out, 38, 1024) is kept between."""
    features = jax.ShapeDtypeStruct((38, 63, 1024), np.float32)
    rois = jax.ShapeDtypeStruct((128, 4), np.float32)
    size = jax.ShapeDtypeStruct((2,), np.int32)
    program = jax.jit(roi_align).lower(features, rois, size).compile()
    between = 128 * 14 * 38 * 1024 * 4
    assert program.memory_analysis().temp_size_in_bytes < 3.2 * between


def test_pool_equals_caffes_loops():
    features = feature_map()
    for out in (2, 7):
        ours = roi_pool(features, ROIS, SIZE, 16, out)
        np.testing.assert_array_equal(ours, pool_by_loops(features, ROIS, out))


def test_pool_gives_the_gradient_to_the_largest_cell():
    features = feature_map(channels=2)
    output, gradient = jax.vjp(lambda x: roi_pool(x, ROIS, SIZE, 16, 3), features)
    cotangent = np.random.default_rng(1).normal(size=output.shape).astype(np.float32)
    (given,) = gradient(jnp.asarray(cotangent))
    for roi in range(len(ROIS)):
        for i, j, c in np.ndindex(3, 3, 2):
            given = given.at[features == output[roi, i, j, c]].add(
                -cotangent[roi, i, j, c]
            )
    np.testing.assert_allclose(given, 0, atol=1e-5)
