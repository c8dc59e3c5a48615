"""Matching against loops, torchvision's Matcher and cases done by hand."""

import jax
import numpy as np
import pytest

from resnet_jax.detection.boxes import iou
from resnet_jax.detection.matching import match


def random_ious(rng, boxes=5, anchors=60):
    corners = rng.integers(0, 40, (boxes + anchors, 2))
    sides = rng.integers(4, 30, (boxes + anchors, 2))
    every = np.concatenate([corners, corners + sides], -1).astype(np.float32)
    return np.asarray(iou(every[:boxes], every[boxes:]))


def test_the_three_labels():
    ious = np.array([[0.7, 0.69, 0.3, 0.29, 0.1], [0.1, 0.8, 0.2, 0, 0.1]], np.float32)
    labels, index = match(ious, np.ones(2, bool), 0.3, 0.7)
    assert (labels.dtype, index.dtype) == (np.int32, np.int32)
    np.testing.assert_array_equal(labels, [1, 1, -1, 0, 0])
    np.testing.assert_array_equal(index, [0, 1, 0, 0, 0])


def test_a_forced_anchor_keeps_its_own_best_box():
    # Anchor 1 is the best of box 1, but lies more on box 0; box 0 prefers anchor 0.
    ious = np.array([[0.6, 0.4, 0], [0, 0.2, 0.1]], np.float32)
    labels, index = match(ious, np.ones(2, bool), 0.3, 0.7, force_best=True)
    np.testing.assert_array_equal(labels, [1, 1, 0])
    np.testing.assert_array_equal(index[:2], [0, 0])


def test_forcing_takes_ties_but_no_anchor_beside_the_box():
    ious = np.array([[0.2, 0.2, 0.1], [0, 0, 0]], np.float32)
    labels, _ = match(ious, np.ones(2, bool), 0.3, 0.7, force_best=True)
    np.testing.assert_array_equal(labels, [1, 1, 0])


def test_absent_boxes_have_no_effect():
    rng = np.random.default_rng(0)
    ious = random_ious(rng)
    present = np.array([True, False, True, True, False])
    some = match(ious, present, 0.3, 0.6, force_best=True)
    alone = match(ious[present], np.ones(3, bool), 0.3, 0.6, force_best=True)
    np.testing.assert_array_equal(some[0], alone[0])
    np.testing.assert_array_equal(some[1], np.flatnonzero(present)[alone[1]])
    labels, index = match(ious, np.zeros(5, bool), 0.3, 0.6, force_best=True)
    assert not labels.any()
    assert not index.any()


@pytest.mark.parametrize("force_best", [False, True])
def test_it_equals_torchvisions_matcher(force_best):
    from tests.torch_peers import import_peer, torch

    peer = import_peer("torchvision.models.detection._utils")
    matcher = peer.Matcher(0.5, 0.3, allow_low_quality_matches=force_best)
    rng = np.random.default_rng(1)
    for _ in range(20):
        ious = random_ious(rng)
        ious = ious[ious.max(1) > 0]  # it matches a box that no anchor touches with all
        theirs = matcher(torch.tensor(ious)).numpy()
        labels, index = match(ious, np.ones(len(ious), bool), 0.3, 0.5, force_best)
        np.testing.assert_array_equal(
            labels, np.where(theirs >= 0, 1, np.where(theirs == -1, 0, -1))
        )
        np.testing.assert_array_equal(np.where(theirs >= 0, index, theirs), theirs)


def test_the_best_anchor_is_found_when_ious_are_compiled_with_it():
    rng = np.random.default_rng(2)
    corners, sides = rng.uniform(0, 90, (4, 300, 2)), rng.uniform(1, 60, (4, 300, 2))
    boxes = np.concatenate([corners, corners + sides], -1).astype(np.float32)
    present = np.ones(20, bool)

    @jax.jit
    @jax.vmap
    def forced(boxes):
        ious = iou(boxes[:20], boxes[20:])
        return ious, match(ious, present, 2, 2, force_best=True)[0]

    ious, labels = (np.asarray(part) for part in forced(boxes))
    for image in range(4):
        best = np.unique(ious[image].argmax(1))
        assert (labels[image][best] == 1).all()
        assert labels[image].sum() == len(best)
