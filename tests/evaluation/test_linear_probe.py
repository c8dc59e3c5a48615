"""Linear probes against scikit-learn's logistic regression."""

import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.evaluation.linear_probe import linear_probe


def clusters(rng, n, c, classes):
    """Features like those after a ReLU and pooling: not negative, far from mean 0."""
    centres = np.random.default_rng(0).normal(0, 0.5, (classes, c))
    mix = np.random.default_rng(1).normal(0, 1 / np.sqrt(c), (c, c))
    labels = rng.integers(0, classes, n)
    noise = centres[labels] + rng.normal(size=(n, c))
    return np.maximum(2 + noise @ mix, 0).astype(np.float32), labels


def objective(kernel, bias, features, labels, l2):
    """In float64, by the formula."""
    logits = features.astype(np.float64) @ kernel + bias
    top = logits.max(axis=1, keepdims=True)
    log_sums = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    losses = log_sums - logits[np.arange(len(labels)), labels]
    return losses.sum() + l2 * (kernel.astype(np.float64) ** 2).sum()


@pytest.mark.parametrize("l2", [5.0, 0.5, 0.005])
@pytest.mark.parametrize(("n", "c", "classes"), [(600, 24, 5), (80, 64, 10)])
def test_a_probe_is_scikit_learns_logistic_regression(n, c, classes, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(2)
    features, labels = clusters(rng, n, c, classes)
    test_features, test_labels = clusters(rng, 500, c, classes)
    found = linear_probe(features, labels, test_features, test_labels, classes, l2=l2)
    peer = linear_model.LogisticRegression(C=1 / (2 * l2), solver="newton-cg", tol=1e-8)
    peer.fit(features.astype(np.float64), labels)
    expected = objective(peer.coef_.T, peer.intercept_, features, labels, l2)
    ours = objective(found.kernel, found.bias, features, labels, l2)
    assert found.converged
    assert ours == pytest.approx(expected, rel=1e-4)
    assert found.loss == pytest.approx(ours, rel=1e-5)
    predictions = (test_features @ found.kernel + found.bias).argmax(axis=1)
    assert (predictions == peer.predict(test_features)).mean() > 0.995
    assert found.test_error == np.mean(predictions != test_labels)
    assert found.train_error == pytest.approx(
        1 - peer.score(features, labels), abs=0.01
    )
    assert found.kernel.dtype == found.bias.dtype == np.float32


def test_a_probe_that_stops_early_says_so():
    features, labels = clusters(np.random.default_rng(0), 100, 8, 3)
    found = linear_probe(features, labels, features, labels, 3, max_iterations=2)
    assert (found.iterations, found.converged) == (2, False)


FEATURES, LABELS = np.ones((4, 2), np.float32), np.array([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"labels": LABELS[:3]}, r"features must be .* not \(4, 2\) and \(3,\)"),
        ({"labels": LABELS + 1}, "labels must be integers from 0 to 2, not int64 from"),
        ({"labels": LABELS / 2}, "labels must be integers from 0 to 2, not float64"),
        ({"test_labels": LABELS - 1}, "test_labels must be integers from 0 to 2"),
        ({"features": FEATURES * np.nan}, "features must be finite"),
        ({"features": FEATURES[:, 0]}, "features must be"),
        ({"test_features": np.ones((4, 3))}, "2 columns and test_features 3"),
        ({"l2": 0.0}, "l2 must be above 0, not 0"),
    ],
)
def test_wrong_features_are_refused(changes, sentence):
    given = {
        "features": FEATURES,
        "labels": LABELS,
        "test_features": FEATURES,
        "test_labels": LABELS,
    }
    with pytest.raises(UserError, match=sentence):
        linear_probe(**given | changes, num_classes=3)
