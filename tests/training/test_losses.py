import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.config.schema import LossConfig
from resnet_jax.evaluation.metrics import cross_entropy
from resnet_jax.training import losses

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(16, 7)).astype(np.float32) * 3
LABELS = RNG.integers(0, 7, 16)
ONE_HOT = np.eye(7, dtype=np.float32)[LABELS]
SOFT = 0.7 * ONE_HOT + 0.3 * ONE_HOT[::-1]


def log_softmax(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def binary(logits, targets):
    """-t log s(x) - (1 - t) log(1 - s(x)), with log s(x) = -log(1 + exp(-x))."""
    return targets * np.log1p(np.exp(-logits)) + (1 - targets) * np.log1p(
        np.exp(logits)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_softmax_is_the_closed_form(smoothing, soft):
    targets = SOFT if soft else ONE_HOT
    smoothed = (1 - smoothing) * targets + smoothing / 7
    expected = -(smoothed * log_softmax(LOGITS)).sum(1)
    given = jnp.asarray(SOFT if soft else LABELS)
    config = LossConfig(label_smoothing=smoothing)
    found = losses.training_loss(config, jnp.asarray(LOGITS), given)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_without_options_it_is_the_loss_of_evaluation():
    found = losses.training_loss(LossConfig(), jnp.asarray(LOGITS), jnp.array(LABELS))
    expected = cross_entropy(jnp.asarray(LOGITS), jnp.array(LABELS))
    np.testing.assert_array_equal(found, expected)


def test_torch_smooths_alike():
    torch = pytest.importorskip("torch")
    for targets in (LABELS, SOFT):
        expected = torch.nn.functional.cross_entropy(
            torch.from_numpy(LOGITS),
            torch.from_numpy(targets),
            label_smoothing=0.1,
            reduction="none",
        )
        found = losses.softmax_cross_entropy(LOGITS, jnp.asarray(targets), 0.1)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("given", "threshold", "targets"),
    [
        (LABELS, None, ONE_HOT),
        (SOFT, None, SOFT),
        # Both classes of a mixed image are wholly there: 0.7 and 0.3 are above 0.2.
        (SOFT, 0.2, (SOFT > 0).astype(np.float32)),
        # With a higher threshold the smaller part is not.
        (SOFT, 0.5, ONE_HOT),
    ],
)
def test_sigmoid_is_the_closed_form(given, threshold, targets, smoothing):
    smoothed = (1 - smoothing) * targets + smoothing / 7
    expected = binary(LOGITS, smoothed).mean(1)
    config = LossConfig("sigmoid", smoothing, threshold)
    found = losses.training_loss(config, jnp.asarray(LOGITS), jnp.asarray(given))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_sigmoid_is_timms_loss(threshold):
    torch = pytest.importorskip("torch")
    from tests.torch_peers import import_peer

    timm_loss = import_peer("timm.loss")
    for targets, smoothing in ((LABELS, 0.1), (LABELS, 0.0), (SOFT, 0.0)):
        if smoothing and threshold:
            continue  # timm's threshold undoes its smoothing
        peer = timm_loss.BinaryCrossEntropy(smoothing, target_threshold=threshold)
        expected = peer(torch.from_numpy(LOGITS), torch.from_numpy(targets))
        found = losses.sigmoid_cross_entropy(
            LOGITS, jnp.asarray(targets), smoothing, threshold
        ).mean()
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_large_logits_stay_finite():
    logits = jnp.array([[200.0, -200.0], [-200.0, 200.0]])
    for loss in (losses.softmax_cross_entropy, losses.sigmoid_cross_entropy):
        found = loss(logits, jnp.array([0, 0]), 0.1)
        assert np.isfinite(found).all()


def test_the_main_label_is_that_of_the_larger_part():
    assert losses.main_labels(jnp.array([3, 1])).tolist() == [3, 1]
    soft = jnp.array([[0.3, 0.0, 0.7], [0.6, 0.4, 0.0]])
    assert losses.main_labels(soft).tolist() == [2, 0]
