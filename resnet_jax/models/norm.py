"""Batch normalisation with global or per-group (ghost) statistics, or none."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.barriers import computed_once
from resnet_jax.models.factories import ModuleFactory, field_names, option_of
from resnet_jax.models.fused import Form, fused_batch_norm, normalize, plain_batch_norm
from resnet_jax.models.platforms import platform


class BatchNorm(nn.Module):
    """Batch normalisation over every axis but the last (Ioffe & Szegedy 2015).

    Under ``jax.jit``, the statistics cover the global batch on any number of devices.
    With ``groups`` above 1, the batch is split in order into equal parts, each
    normalised by its own statistics: the paper's 8 GPUs with 32 ImageNet images each
    are ``groups=8`` at batch 256.

    Statistics are at least float32 for every ``dtype``, and computed in one pass over
    the map; see ``batch_moments``. The running variance averages the unbiased estimate,
    m / (m - 1) times the variance of a group's m values, as in algorithm 2 of Ioffe &
    Szegedy, Caffe and torch.

    Attributes:
      use_running_average: normalise by the running statistics and leave them
        unchanged: in evaluation, or frozen in training.
      momentum: decay of the running statistics; 0.9 here is 0.1 in torch.
      epsilon: added to the variance.
      groups: the number of parts.
      unbiased: False averages the biased variance, as Linen's BatchNorm does.
      dtype: dtype of the output.
      scale_init: initialiser of the scale.
      fused: in training, compute normalisation, addition and ReLU as one function with
        its own gradient, see ``models.fused``. False differentiates it automatically,
        also in forward mode (``jax.jvp``, ``jax.hessian``). Equal up to rounding. None
        is False on TPUs, whose programs move less memory with False, else True.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    groups: int = 1
    unbiased: bool = True
    dtype: Any = jnp.float32
    scale_init: Callable[..., Any] = nn.initializers.ones
    fused: bool | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, shortcut: jax.Array | None = None, relu: bool = False
    ) -> jax.Array:
        """Normalises ``x``, then adds ``shortcut`` if given, then applies ReLU.

        ``x`` and ``shortcut`` are (n, ..., c).

        Raises:
          ValueError: ``groups`` does not divide the batch.
        """
        like = (x.shape[-1:], jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, *like)
        running_var = self.variable("batch_stats", "var", jnp.ones, *like)
        scale = self.param("scale", self.scale_init, *like)
        bias = self.param("bias", nn.initializers.zeros, *like)

        if self.use_running_average:
            mean, var = running_mean.value, running_var.value
            y = normalize(x, mean, var, scale, bias, self.epsilon).astype(self.dtype)
            y = y if shortcut is None else y + shortcut.astype(self.dtype)
            return nn.relu(y) if relu else y

        if x.shape[0] % self.groups and not self.is_initializing():
            raise ValueError(
                f"a batch of {x.shape[0]} does not divide into {self.groups} batch "
                "normalisation groups"
            )
        groups = 1 if self.is_initializing() else self.groups
        shape = (groups, x.shape[0] // groups, *x.shape[1:])
        compute = fused_batch_norm if is_fused(self) else plain_batch_norm
        y, mean, var = compute(
            x.reshape(shape),
            None if shortcut is None else shortcut.reshape(shape),
            scale,
            bias,
            Form(self.epsilon, relu, self.dtype),
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
    """The identity, in the place of a normalisation."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``x``."""
        return x


def norm_act(
    norm: Callable[..., jax.Array],
    x: jax.Array,
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu,
    added: jax.Array | None = None,
) -> jax.Array:
    """activation(norm(x) + added), as one function where the normalisation fuses them.

    ``norm`` may be any function of x. None leaves out the activation or the sum.
    """
    if is_fused(norm) and activation is nn.relu:
        y = norm(x, added, relu=True)
    else:
        y = norm(x) if added is None else norm(x) + added
        y = y if activation is None else activation(y)
    return y if added is None else computed_once(y)


def is_frozen(frozen: bool | Sequence[str], part: str) -> bool:
    """Whether a net's ``batch_norm_frozen`` applies to one of its parts."""
    return frozen if isinstance(frozen, bool) else part in frozen


def is_fused(norm: Any) -> bool:
    """Whether a BatchNorm, or a factory of them, is fused: only ever in training."""
    if "fused" not in field_names(norm) or option_of(norm, "use_running_average"):
        return False
    fused = option_of(norm, "fused")
    return platform() != "tpu" if fused is None else fused


def groups_of(norm: ModuleFactory) -> int:
    """Parts of the batch with separate statistics; 1 if not a BatchNorm factory."""
    return option_of(norm, "groups") if "groups" in field_names(norm) else 1
