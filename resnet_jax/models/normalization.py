"""Batch normalisation with global or per-group (ghost) statistics, or none."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.fused import (
    Form,
    fused_batch_norm,
    normalize,
    plain_batch_norm,
)

NORMALIZATIONS = ("batch", "none")


class BatchNorm(nn.Module):
    """Batch normalisation over every axis but the last (Ioffe & Szegedy 2015).

    Under ``jax.jit`` with a sharded batch the statistics are those of the whole
    batch, whatever the number of devices. With ``groups`` above 1 the batch is cut
    into that many equal parts in order, each normalised by its own statistics: the
    paper's 8 x 32 images of ImageNet are ``groups=8`` at batch 256 on any topology.

    Statistics are at least float32 for every ``dtype``. The variance is by default the
    mean of squared deviations: never negative, and exact where E[x^2] - E[x]^2 cancels.
    The running variance averages m / (m - 1) times that of the m values of a group, the
    unbiased estimate of Ioffe & Szegedy's algorithm 2, as Caffe's and torch's do.

    Attributes:
      use_running_average: normalise by the running statistics, and keep them: in
        evaluation, or frozen in training.
      momentum: the running statistics' decay; 0.9 here is torch's 0.1.
      epsilon: added to the variance.
      groups: the number of parts of the batch with statistics of their own.
      unbiased: False averages the biased variance in the running one, as Linen's
        BatchNorm does.
      dtype: dtype of the output.
      scale_init: initialiser of the scale.
      variance: "two_pass", or "fast": E[x^2] - E[x]^2, see ``batch_moments``.
      arithmetic: of maps in training: "wide" is float32 at least, "narrow" is
        ``dtype``; see ``models.fused.Form``. In evaluation it is wide.
      fused: in training, normalisation, addition and ReLU are one function that keeps
        less for the gradient; the same to rounding. See ``models.fused``.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    groups: int = 1
    unbiased: bool = True
    dtype: Any = jnp.float32
    scale_init: Callable[..., Any] = nn.initializers.ones
    variance: str = "two_pass"
    arithmetic: str = "wide"
    fused: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, shortcut: jax.Array | None = None, relu: bool = False
    ) -> jax.Array:
        """Normalises ``x``, then adds ``shortcut``, then applies ReLU if asked.

        Args:
          x: (n, ..., c).
          shortcut: of the shape of x; None: nothing is added.
          relu: whether negative values become zero.
        """
        channels = (x.shape[-1],)
        running_mean = self.variable(
            "batch_stats", "mean", jnp.zeros, channels, jnp.float32
        )
        running_var = self.variable(
            "batch_stats", "var", jnp.ones, channels, jnp.float32
        )
        scale = self.param("scale", self.scale_init, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)

        if self.use_running_average:
            mean, var = running_mean.value, running_var.value
            y = normalize(x, mean, var, scale, bias, self.epsilon).astype(self.dtype)
            y = y if shortcut is None else y + shortcut
            return nn.relu(y) if relu else y

        if x.shape[0] % self.groups and not self.is_initializing():
            raise ValueError(
                f"a batch of {x.shape[0]} does not divide into {self.groups} batch "
                "normalisation groups"
            )
        if self.fused and self.arithmetic != "wide":
            raise ValueError("the fused normalisation's arithmetic is wide alone")
        groups = 1 if self.is_initializing() else self.groups
        shape = (groups, x.shape[0] // groups, *x.shape[1:])
        compute = fused_batch_norm if self.fused else plain_batch_norm
        y, mean, var = compute(
            x.reshape(shape),
            None if shortcut is None else shortcut.reshape(shape),
            scale,
            bias,
            Form(self.epsilon, self.variance, relu, self.dtype, self.arithmetic),
        )
        if not self.is_initializing():
            keep = self.momentum
            batch_mean = mean.reshape(groups, -1).mean(0)
            batch_var = var.reshape(groups, -1).mean(0)
            count = x.size // (groups * x.shape[-1])
            if self.unbiased and count > 1:
                batch_var = batch_var * (count / (count - 1))
            running_mean.value = keep * running_mean.value + (1 - keep) * batch_mean
            running_var.value = keep * running_var.value + (1 - keep) * batch_var
        return y.reshape(x.shape)


class NoNorm(nn.Module):
    """The identity in a normalisation's place."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``x``."""
        return x


def is_frozen(frozen: bool | Sequence[str], part: str) -> bool:
    """Whether a net's ``batch_norm_frozen`` holds for one of its parts."""
    return frozen if isinstance(frozen, bool) else part in frozen


def norm_act(
    norm: Any, x: jax.Array, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """activation(norm(x)), as one function where the normalisation fuses them."""
    return norm(x, relu=True) if fuses(norm, activation) else activation(norm(x))


def fuses(norm: Any, activation: Callable[[jax.Array], jax.Array]) -> bool:
    """Whether a normalisation, of any kind, computes the activation (ReLU) with it.

    ``norm(x, shortcut, relu=True)`` is then one function, ``models.fused``.
    """
    fused = isinstance(norm, BatchNorm) and norm.fused
    return fused and not norm.use_running_average and activation is nn.relu
