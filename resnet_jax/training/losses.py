"""The losses that training minimises; evaluation reports ``metrics.cross_entropy``.

Targets are labels (n,) or, for mixed images, soft labels (n, k) whose rows sum to 1.
Each function returns the loss of every example, (n,) float32.
"""

import jax
import jax.numpy as jnp
import optax

from resnet_jax.config.schema import LossConfig
from resnet_jax.evaluation.metrics import cross_entropy


def training_loss(
    config: LossConfig, logits: jax.Array, targets: jax.Array
) -> jax.Array:
    """The loss (n,) of logits (n, k) that a config names."""
    smoothing = config.label_smoothing
    if config.kind == "sigmoid":
        return sigmoid_cross_entropy(
            logits, targets, smoothing, config.target_threshold
        )
    return softmax_cross_entropy(logits, targets, smoothing)


def softmax_cross_entropy(
    logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Minus the sum over classes of target times log softmax.

    ``label_smoothing`` spreads this share of a target's probability evenly over all
    classes, including its own (Szegedy et al. 2015, section 7).
    """
    if targets.ndim == 1 and not label_smoothing:
        return cross_entropy(logits, targets)
    logits = logits.astype(jnp.float32)
    soft = optax.smooth_labels(soft_labels(targets, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, soft)


def sigmoid_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    label_smoothing: float = 0.0,
    threshold: float | None = None,
) -> jax.Array:
    """The mean over classes of the binary cross-entropy of each sigmoid.

    Each class is a separate question, as in "ResNet strikes back" (Wightman et al.
    2021): a mixed image contains two classes. With a ``threshold``, a class with a
    larger weight has target 1 and every other class 0; ``label_smoothing`` comes after
    that. timm's ``BinaryCrossEntropy`` takes the same mean over classes.
    """
    logits = logits.astype(jnp.float32)
    soft = soft_labels(targets, logits.shape[-1])
    if threshold is not None:
        soft = (soft > threshold).astype(jnp.float32)
    soft = optax.smooth_labels(soft, label_smoothing)
    return optax.sigmoid_binary_cross_entropy(logits, soft).mean(-1)


def soft_labels(targets: jax.Array, num_classes: int) -> jax.Array:
    """Targets (n,) as one-hot rows (n, num_classes); soft labels stay as they are."""
    return jax.nn.one_hot(targets, num_classes) if targets.ndim == 1 else targets


def main_labels(targets: jax.Array) -> jax.Array:
    """Labels (n,); for soft targets the class with the largest weight.

    The training error counts these: for a mixed image, the label of the larger part.
    """
    return targets if targets.ndim == 1 else jnp.argmax(targets, axis=-1)
