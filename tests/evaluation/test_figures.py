"""Figures of a test against closed forms and small sums by hand."""

import numpy as np
import pytest

from resnet_jax.evaluation.figures import Records, calibration, difference, figures


def record(log_probs, targets):
    records = Records.empty(len(log_probs))
    for index, (values, target) in enumerate(zip(log_probs, targets)):
        if target is not None:
            records.set(index, values, np.atleast_1d(target).tolist())
    return records


@pytest.fixture
def log_probs():
    logits = np.random.default_rng(0).normal(0, 2, (200, 120)).astype(np.float32)
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)


def test_errors_loss_and_confusion(log_probs):
    targets = np.random.default_rng(1).integers(0, 120, 200)
    targets[:90] = log_probs[:90].argmax(-1)
    found = figures(record(log_probs, targets), list(map(str, range(120))))
    order = np.argsort(-log_probs, -1)
    wrong = order[:, 0] != targets
    top5 = ~(order[:, :5] == targets[:, None]).any(-1)
    assert found["errors"] == wrong.sum()
    assert found["count"] == 200
    assert found["error"] == wrong.mean()
    assert found["top5_errors"] == top5.sum()
    expected = -log_probs[np.arange(200), targets].mean()
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    matrix = np.zeros((120, 120), int)
    np.add.at(matrix, (targets, order[:, 0]), 1)
    assert {(a, b): n for a, b, n in found["confusion"]} == {
        (a, b): matrix[a, b] for a, b in np.argwhere(matrix)
    }
    for name, own in found["classes"].items():
        assert own["count"] == (targets == int(name)).sum() > 0
        assert own["errors"] == (wrong & (targets == int(name))).sum()


def test_without_a_hundred_classes_there_is_no_top5():
    records = record(np.log(np.full((3, 4), 0.25, np.float32)), [0, 1, 2])
    assert "top5_error" not in figures(records, "abcd")


def test_calibration_by_hand():
    confidences = np.float32([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    log_probs = np.log(np.stack([confidences, 1 - confidences], 1))
    records = record(log_probs, [0, 0, 0, 1, 0, 1])
    found = calibration(records)
    expected = (4 * abs(0.75 - 0.95) + 2 * abs(0.5 - 0.55)) / 6
    assert found["error"] == pytest.approx(expected, abs=1e-6)
    assert [b["count"] for b in found["bins"]] == [2, 4]
    # Twice the same probability as accuracy: nothing to correct.
    perfect = record(np.log(np.full((4, 2), 0.5, np.float32)), [0, 1, 0, 1])
    assert calibration(perfect)["error"] == pytest.approx(0, abs=1e-7)


def test_several_right_answers_or_none(log_probs):
    best = log_probs.argmax(-1)
    targets = [(int(best[0]), 3), (int(best[1]) ^ 1,), None, (5, 6)]
    records = record(log_probs[:4], targets)
    found = figures(records, ["c"] * 120, one_label=False)
    assert found["count"] == 3
    expected = 1 + (best[3] not in (5, 6))
    assert found["errors"] == expected
    assert "confusion" not in found
    assert "loss" not in found


def test_nan_is_an_error():
    records = record(np.full((1, 120), np.nan, np.float32), [3])
    found = figures(records, ["c"] * 120)
    assert found["errors"] == found["top5_errors"] == 1


def test_the_interval_of_a_difference():
    rng = np.random.default_rng(0)
    n = 1000
    ours, others = rng.random(n) < 0.3, rng.random(n) < 0.2

    def records(wrong):
        made = Records.empty(n)
        made.counted[:] = 1
        made.predicted[:] = wrong
        return made

    found = difference(records(ours), records(others))
    values = ours.astype(float) - others
    assert found["difference"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(n)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.003)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.003)
    assert found["only_first_wrong"] == (ours & ~others).sum()
    same = difference(records(ours), records(ours))
    assert (same["low"], same["high"]) == (0, 0)
