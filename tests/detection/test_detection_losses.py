"""The losses against numbers by hand, and the choice of what they see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.config.detection import DetectorConfig
from resnet_jax.detection.anchors import Anchors
from resnet_jax.detection.losses import (
    AnchorSample,
    RegionSample,
    anchor_places,
    head_losses,
    rpn_losses,
    sample_anchors,
    sample_regions,
    smooth_l1,
)
from resnet_jax.detection.rpn import Proposals

CONFIG = DetectorConfig(rpn_samples=64, roi_samples=16, border_anchors=True)
ANCHORS = Anchors(sizes=(32.0, 64.0))
BOXES = jnp.array([[10.0, 10, 50, 44], [60, 30, 120, 90], [0, 0, 0, 0]])
CLASSES = jnp.array([2, 0, -1])


def test_smooth_l1_by_hand():
    x = jnp.array([-2.0, -0.5, 0.0, 0.25, 1.0])
    np.testing.assert_allclose(smooth_l1(x, 1.0), [1.5, 0.125, 0, 0.03125, 0.5])
    np.testing.assert_allclose(smooth_l1(x, 0.25), [1.875, 0.375, 0, 0.125, 0.875])


def test_denominators_do_not_depend_on_the_number_of_objects():
    objectness, deltas = jnp.zeros(9), jnp.zeros((9, 4)).at[3, 0].set(1.0)
    drawn = AnchorSample(
        jnp.array([3, 5, 0, 0]), jnp.array([1, 0, -1, -1]), jnp.zeros((4, 4))
    )
    classification, boxes = rpn_losses(objectness, deltas, drawn, beta=1.0)
    np.testing.assert_allclose(classification, 2 * np.log(2) / 4, rtol=1e-6)
    np.testing.assert_allclose(boxes, 0.5 / 4, rtol=1e-6)

    logits, deltas = jnp.zeros((4, 4)), jnp.zeros((4, 3, 4)).at[1, 2, 1].set(-1.0)
    drawn = RegionSample(jnp.zeros((4, 4)), jnp.array([0, 2, 3, -1]), jnp.zeros((4, 4)))
    classification, boxes = head_losses(logits, deltas, drawn)
    np.testing.assert_allclose(classification, 3 * np.log(4) / 4, rtol=1e-6)
    np.testing.assert_allclose(boxes, 0.5 / 4, rtol=1e-6)


def chosen(boxes, classes, config=CONFIG, height=8, width=10, size=(100, 150), key=0):
    anchors = ANCHORS.grid(height, width)
    cells = np.mgrid[:height, :width].reshape(2, -1).T
    inside = (cells < -(-np.array(size) // 16)).all(1)
    places = anchor_places(height, width, ANCHORS.per_cell)
    drawn = sample_anchors(
        jax.random.key(key),
        jnp.asarray(anchors),
        jnp.asarray(np.repeat(inside, ANCHORS.per_cell)),
        jnp.asarray(places),
        jnp.array(size),
        boxes,
        classes,
        config,
    )
    return anchors, drawn


def test_anchors_are_the_same_in_any_bucket():
    small, first = chosen(BOXES, CLASSES)
    large, second = chosen(BOXES, CLASSES, height=20, width=16)
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(small[first.indices], large[second.indices])
    np.testing.assert_array_equal(first.targets, second.targets)
    assert (first.labels == 1).sum() >= 2
    assert (first.labels == 0).sum() > 20
    _, other = chosen(BOXES, CLASSES, key=1)
    assert not np.array_equal(first.indices, other.indices)


def test_anchors_over_the_border_are_left_out_if_asked():
    config = DetectorConfig(rpn_samples=64, border_anchors=False)
    anchors, drawn = chosen(BOXES, CLASSES, config)
    used = anchors[np.asarray(drawn.indices)][np.asarray(drawn.labels) >= 0]
    assert len(used) > 5
    assert (used >= 0).all()
    assert (used[:, [2, 3]] <= [150, 100]).all()


@pytest.mark.parametrize("roi_low", [0.0, 0.1])
def test_an_image_without_objects_has_background_and_finite_losses(roi_low):
    config = DetectorConfig(rpn_samples=64, roi_samples=16, roi_low=roi_low)
    none = jnp.full(3, -1)
    _, drawn = chosen(BOXES, none, config)
    assert (drawn.labels <= 0).all()
    proposals = Proposals(
        jnp.tile(jnp.array([5.0, 5, 40, 60]), (20, 1)), jnp.ones(20), jnp.ones(20, bool)
    )
    regions = sample_regions(jax.random.key(0), proposals, BOXES, none, config, 3)
    assert (regions.labels == 3).all()

    def loss(logits, deltas):
        return sum(head_losses(logits, deltas, regions))

    found, gradients = jax.value_and_grad(loss, argnums=(0, 1))(
        jnp.ones((16, 4)), jnp.ones((16, 3, 4))
    )
    assert np.isfinite(found)
    assert not gradients[1].any()
    assert gradients[0].any()


def test_regions_have_their_objects_classes_and_a_quarter_are_objects():
    rng = np.random.default_rng(0)
    near = np.repeat(np.asarray(BOXES[:2]), 20, axis=0) + rng.normal(0, 2, (40, 4))
    far = np.array([[130.0, 0, 150, 20]])
    between = np.array([[10.0, 10, 30, 30]])  # 0.29 of the first object
    boxes = jnp.asarray(np.concatenate([near, far, between] * 2), jnp.float32)
    count = len(boxes)
    proposals = Proposals(boxes, jnp.ones(count), jnp.ones(count, bool))
    drawn = sample_regions(jax.random.key(0), proposals, BOXES, CLASSES, CONFIG, 3)
    labels = np.asarray(drawn.labels)
    assert ((labels >= 0) & (labels < 3)).sum() == 4
    assert set(labels) <= {0, 2, 3, -1}
    background = np.asarray(drawn.boxes)[labels == 3]
    # What touches no object is no background for Fast R-CNN.
    assert len(background) == 2
    np.testing.assert_allclose(background, np.tile(between, (2, 1)))
    for box, label in zip(np.asarray(drawn.boxes), labels):
        if label in (0, 2):
            wanted = np.asarray(BOXES)[0 if label == 2 else 1]
            assert np.abs(box - wanted).max() < 15
