"""Linear probes: how well a linear classifier on a net's features does.

The features stay as they are, so the error says what the net has learned, not what it
could learn by fine-tuning.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax.errors import UserError

_TOLERANCE = 1e-5
"""Of the loss: the most that is left to gain."""


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """A classifier of features, and its errors.

    Attributes:
      kernel: float32 (c, k), as a net's ``head/kernel``.
      bias: float32 (k,).
      loss: the minimum: cross-entropy summed over the training examples, plus ``l2``
        times the sum of squares of the kernel.
      train_error, test_error: shares of wrong examples.
      iterations: of L-BFGS.
      converged: whether at most 1e-5 of the loss was left to gain. Where the loss is
        tiny, as with separable classes and hardly any penalty, float32 may not get
        there.
    """

    kernel: np.ndarray
    bias: np.ndarray
    loss: float
    train_error: float
    test_error: float
    iterations: int
    converged: bool


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    *,
    l2: float = 0.5,
    max_iterations: int = 1000,
) -> LinearProbe:
    """Fits multinomial logistic regression to features, and tests it.

    Minimises the cross-entropy summed over the examples plus ``l2 |kernel|^2``, without
    a penalty on the bias: scikit-learn's ``LogisticRegression(C=1 / (2 * l2))``.
    Full-batch L-BFGS in float32 runs until the gradient is so small that at most about
    1e-5 of the loss is left to gain.

    Features are not scaled. To standardise them, divide both sets by the deviations of
    the training set first; the fit subtracts means itself, which changes no result.

    Args:
      features: (n, c) numbers, all on the device at once.
      labels: (n,) integers from 0 to ``num_classes`` - 1.
      test_features: (m, c).
      test_labels: (m,); the test set changes ``test_error`` alone.
      num_classes: k.
      l2: strength of the penalty, to be chosen on held-out data, not on the test set.
      max_iterations: stop here even if the gradient is larger.

    Raises:
      UserError: shapes do not fit, a label is out of range, a feature is not finite, or
        l2 is not above 0.
    """
    features, labels = _checked("features", features, labels, num_classes)
    test_features, test_labels = _checked(
        "test_features", test_features, test_labels, num_classes
    )
    if features.shape[1] != test_features.shape[1]:
        raise UserError(
            f"features have {features.shape[1]} columns and test_features "
            f"{test_features.shape[1]}: take both from the same net"
        )
    if not 0 < l2 < np.inf:
        raise UserError(f"l2 must be above 0, not {l2}")
    # The bias absorbs the mean. Without it, L-BFGS needs far fewer iterations.
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        params, loss, count, converged = jax.device_get(
            _minimize(features - mean, labels, l2, num_classes, max_iterations)
        )
    kernel, bias = params["kernel"], params["bias"] - mean @ params["kernel"]
    return LinearProbe(
        kernel=kernel,
        bias=bias,
        loss=float(loss) * len(features),
        train_error=_error(features @ kernel + bias, labels),
        test_error=_error(test_features @ kernel + bias, test_labels),
        iterations=int(count),
        converged=bool(converged),
    )


def _error(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(logits.argmax(axis=1) != labels))


@functools.partial(jax.jit, static_argnames="num_classes")
def _minimize(
    features: jax.Array, labels: jax.Array, l2: Any, num_classes: int, most: Any
) -> tuple[dict[str, jax.Array], jax.Array, Any, jax.Array]:
    """The parameters, the mean loss, the iterations and whether they were enough."""
    n, c = features.shape

    def loss_of(params):
        logits = features @ params["kernel"] + params["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean() + l2 / n * (params["kernel"] ** 2).sum()

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss_of)
    start = {"kernel": jnp.zeros((c, num_classes)), "bias": jnp.zeros(num_classes)}

    def is_done(value, gradient):
        # The penalty makes the loss strongly convex in the kernel, with the factor
        # 2 l2 / n: a gradient g bounds what is left to gain by |g|^2 / (2 * factor).
        gap = optax.tree.norm(gradient, squared=True) * n / (4 * l2)
        return gap <= _TOLERANCE * value

    def unfinished(carry):
        _, _, count, done = carry
        return (count < most) & ~done

    def step(carry):
        params, state, count, _ = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = solver.update(
            gradient, state, params, value=value, grad=gradient, value_fn=loss_of
        )
        params = optax.apply_updates(params, updates)
        done = is_done(optax.tree.get(state, "value"), optax.tree.get(state, "grad"))
        return params, state, count + 1, done

    params, _, count, done = jax.lax.while_loop(
        unfinished, step, (start, solver.init(start), 0, jnp.array(False))
    )
    return params, loss_of(params), count, done


def _checked(
    name: str, features: Any, labels: Any, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features as float32 and labels as int32.

    Raises:
      UserError: see ``linear_probe``.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    others = name.replace("features", "labels")
    if features.ndim != 2 or labels.shape != features.shape[:1] or not labels.size:
        raise UserError(
            f"{name} must be (n, c) and {others} (n,), with n above 0, not "
            f"{features.shape} and {labels.shape}"
        )
    if not np.isfinite(features).all():
        raise UserError(f"{name} must be finite; some are infinite or NaN")
    is_integer = np.issubdtype(labels.dtype, np.integer)
    if not is_integer or labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"{others} must be integers from 0 to {num_classes - 1}, not "
            f"{labels.dtype} from {labels.min()} to {labels.max()}"
        )
    return features, labels.astype(np.int32)
