"""Batch normalisation with global or per-group (ghost) statistics, or none."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

NORMALIZATIONS = ("batch", "none")


class BatchNorm(nn.Module):
    """Batch normalisation over every axis but the last (Ioffe & Szegedy 2015).

    Under ``jax.jit`` with a sharded batch the statistics are those of the whole
    batch, whatever the number of devices. With ``groups`` above 1 the batch is cut
    into that many equal parts in order, each normalised by its own statistics: the
    paper's 8 x 32 images of ImageNet are ``groups=8`` at batch 256 on any topology.

    Statistics are at least float32 for every ``dtype``. The variance is the mean of
    squared deviations: never negative, and exact where E[x^2] - E[x]^2 cancels. The
    running variance averages m / (m - 1) times that of the m values of a group, the
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
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    groups: int = 1
    unbiased: bool = True
    dtype: Any = jnp.float32
    scale_init: Callable[..., Any] = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises ``x`` of shape (n, ..., c)."""
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
            return self._normalize(x, mean, var, scale, bias)

        if x.shape[0] % self.groups and not self.is_initializing():
            raise ValueError(
                f"a batch of {x.shape[0]} does not divide into {self.groups} batch "
                "normalisation groups"
            )
        groups = 1 if self.is_initializing() else self.groups
        grouped = x.reshape(groups, x.shape[0] // groups, *x.shape[1:])
        axes = tuple(range(1, grouped.ndim - 1))
        wide = _widen(grouped)
        mean = wide.mean(axes, keepdims=True)
        var = jnp.square(wide - mean).mean(axes, keepdims=True)
        if not self.is_initializing():
            keep = self.momentum
            batch_mean = mean.reshape(groups, -1).mean(0)
            batch_var = var.reshape(groups, -1).mean(0)
            count = wide.size // (groups * x.shape[-1])
            if self.unbiased and count > 1:
                batch_var = batch_var * (count / (count - 1))
            running_mean.value = keep * running_mean.value + (1 - keep) * batch_mean
            running_var.value = keep * running_var.value + (1 - keep) * batch_var
        return self._normalize(grouped, mean, var, scale, bias).reshape(x.shape)

    def _normalize(self, x, mean, var, scale, bias):
        y = (_widen(x) - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale)
        return (y + bias).astype(self.dtype)


class NoNorm(nn.Module):
    """The identity in a normalisation's place."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``x``."""
        return x


def is_frozen(frozen: bool | Sequence[str], part: str) -> bool:
    """Whether a net's ``batch_norm_frozen`` holds for one of its parts."""
    return frozen if isinstance(frozen, bool) else part in frozen


def _widen(x):
    """``x`` in float32, or in its own dtype if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
