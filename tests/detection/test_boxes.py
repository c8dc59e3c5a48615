"""Areas, overlaps and deltas against NumPy, and against numbers done by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.detection import boxes

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def random_boxes(rng, *shape, extent=100.0):
    corners = rng.uniform(0, extent, (*shape, 2))
    sides = rng.uniform(1, extent, (*shape, 2))
    return np.concatenate([corners, corners + sides], -1).astype(np.float32)


def test_iou_of_pairs_done_by_hand():
    a = np.array([[0, 0, 10, 10], [5, 5, 5, 9], [9, 9, 3, 3]], np.float32)
    b = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10]], np.float32)
    expected = [[1, 50 / 150, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(boxes.iou(a, b), expected, rtol=1e-6)
    np.testing.assert_array_equal(boxes.area(a), [100, 0, 0])
    absent = jnp.zeros((1, 4))
    np.testing.assert_array_equal(boxes.iou(absent, absent), [[0]])


def test_iou_counts_the_pixels_that_boxes_share():
    rng = np.random.default_rng(0)
    whole = np.round(random_boxes(rng, 12, extent=20))

    def pixels(box):
        x1, y1, x2, y2 = box.astype(int)
        mask = np.zeros((40, 40), bool)
        mask[y1:y2, x1:x2] = True
        return mask

    masks = [pixels(box) for box in whole]
    expected = [[(m & n).sum() / (m | n).sum() for n in masks] for m in masks]
    np.testing.assert_allclose(boxes.iou(whole, whole), expected, rtol=1e-6)


def test_deltas_done_by_hand():
    anchor = np.array([10, 20, 30, 60], np.float32)  # 20 x 40 around (20, 40)
    box = np.array([20, 30, 60, 50], np.float32)  # 40 x 20 around (40, 40)
    expected = [10 * 1, 0, 5 * np.log(2), -5 * np.log(2)]
    np.testing.assert_allclose(
        boxes.encode(box, anchor, WEIGHTS), expected, rtol=1e-6, atol=1e-6
    )


def test_decoding_inverts_encoding():
    rng = np.random.default_rng(1)
    targets, anchors = random_boxes(rng, 50, 3), random_boxes(rng, 50, 1)
    deltas = boxes.encode(targets, anchors, WEIGHTS)
    assert deltas.shape == (50, 3, 4)
    np.testing.assert_allclose(
        boxes.decode(deltas, anchors, WEIGHTS), targets, atol=2e-3
    )


def test_large_scales_are_cut():
    anchor = np.array([-8, -8, 8, 8], np.float32)
    box = boxes.decode(np.full(4, 1e4, np.float32), anchor, (1, 1, 1, 1))
    np.testing.assert_allclose(box[2:] - box[:2], 1000, rtol=1e-3)
    wide = boxes.decode(np.array([0, 0, 50, 0], np.float32), anchor, WEIGHTS)
    np.testing.assert_allclose(wide, [-500, -8, 500, 8], rtol=1e-5)


def test_absent_boxes_give_finite_deltas_and_gradients():
    absent, present = jnp.zeros(4), jnp.array([1.0, 2, 30, 40])
    for pair in ((absent, absent), (present, absent), (absent, present)):
        assert np.isfinite(boxes.encode(*pair, WEIGHTS)).all()
    gradient = jax.grad(lambda b: boxes.iou(b[None], absent[None]).sum())(absent)
    assert np.isfinite(gradient).all()


def test_clipping():
    some = jnp.array([[-5.0, -1, 70, 70], [9, 8, 7, 6]])
    cut = boxes.clip(some, np.array([40, 60]))
    np.testing.assert_array_equal(cut, [[0, 0, 60, 40], [9, 8, 7, 6]])


def test_deltas_equal_torchvisions():
    from tests.torch_peers import import_peer, torch

    coder = import_peer("torchvision.models.detection._utils").BoxCoder(WEIGHTS)
    rng = np.random.default_rng(2)
    targets, anchors = random_boxes(rng, 40), random_boxes(rng, 40)
    theirs = coder.encode_single(torch.tensor(targets), torch.tensor(anchors))
    np.testing.assert_allclose(
        boxes.encode(targets, anchors, WEIGHTS), theirs, rtol=1e-4, atol=1e-5
    )
    deltas = rng.normal(0, 5, (40, 4)).astype(np.float32)
    theirs = coder.decode_single(torch.tensor(deltas), torch.tensor(anchors))
    ours = boxes.decode(deltas, anchors, WEIGHTS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
