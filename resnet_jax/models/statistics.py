"""Batch statistics recomputed after training ("precise" batch normalisation)."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.errors import UserError
from resnet_jax.models.fused import along, widen
from resnet_jax.models.norm import BatchNorm


def precise_batch_stats(
    model: nn.Module, variables: dict[str, Any], batches: Iterable[jax.Array]
) -> Any:
    """Returns new ``batch_stats``, computed over all values of some batches.

    A moving average covers few batches and outdated weights. The authors' released
    models use averages over a large sample instead. ``add_batch`` has the equations.

    Args:
      model: a net with batch normalisation.
      variables: its params and batch_stats.
      batches: images (n, h, w, c), normalised as the net expects them; of one shape.

    Raises:
      UserError: the net has no batch normalisation, or there is no batch.
    """
    refuse_without_batch_stats(model, variables)
    add = jax.jit(add_batch, static_argnums=0)
    count = 0
    for images in batches:
        variables = variables | {"batch_stats": add(model, variables, count, images)}
        count += 1
    if not count:
        raise UserError("batch statistics cannot be averaged over no batches")
    return variables["batch_stats"]


def refuse_without_batch_stats(model: nn.Module, variables: Any) -> None:
    """Raises UserError where a net has no statistics to recompute."""
    if not variables.get("batch_stats"):
        raise UserError(f"{type(model).__name__} has no batch statistics to recompute")


def add_batch(
    model: nn.Module, variables: dict[str, Any], seen: jax.Array | int, images: Any
) -> Any:
    """The statistics over ``seen`` batches, which are in ``variables``, and one more.

    They are the mean and variance of all values that a normalisation has seen, taken as
    one sample (Wu & Johnson 2021, section 3; Chan, Golub & LeVeque 1983):

        n = n1 + n2,  d = mean2 - mean1
        mean = mean1 + d n2 / n
        var = (S1 + S2 + d^2 n1 n2 / n) / (n - 1),  S = sum of squared deviations

    or over n if ``BatchNorm.unbiased`` is False. The net runs as in training: each
    normalisation normalises by the statistics of its batch or group, while the new
    statistics cover all groups. Dropout and stochastic depth are off; frozen
    normalisations keep their statistics.

    All batches have one shape. If ``seen`` is 0, the old statistics do not count.
    """
    if hasattr(model, "stochastic_depth_rate"):
        model = model.clone(stochastic_depth_rate=0.0)

    def collect(
        call: Callable[..., jax.Array],
        args: tuple[jax.Array],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> jax.Array:
        norm = context.module
        if isinstance(norm, nn.Dropout):
            return args[0]
        if not isinstance(norm, BatchNorm) or norm.use_running_average:
            return call(*args, **kwargs)
        before: Any = {name: norm.get_variable("batch_stats", name) for name in _NAMES}
        y = call(*args, **kwargs)
        for name, value in _merged(before, seen, args[0], norm.unbiased).items():
            norm.put_variable("batch_stats", name, value)
        return y

    with nn.intercept_methods(collect):
        _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return updates["batch_stats"]


_NAMES = ("mean", "var")


def _merged(
    before: dict[str, jax.Array], seen: jax.Array | int, x: jax.Array, unbiased: bool
) -> dict[str, jax.Array]:
    """Mean and variance (c,) of ``seen`` batches' values and those of x (n, ..., c)."""
    x = widen(x)
    axes = tuple(range(x.ndim - 1))
    # Counts are floats: 1.3 million maps of 112 x 112 have more than 2^31 values.
    new = float(x.size // x.shape[-1])
    old = jnp.asarray(seen, jnp.float32) * new
    total = old + new
    old_mean, old_var = (jnp.where(old > 0, before[name], 0) for name in _NAMES)
    mean = x.mean(axes)
    delta = mean - old_mean
    freedom = 1.0 if unbiased else 0.0
    squares = (
        old_var * jnp.maximum(old - freedom, 0)
        + jnp.square(x - along(mean, x)).sum(axes)
        + jnp.square(delta) * (old / total * new)
    )
    return {
        "mean": old_mean + delta * (new / total),
        "var": squares / jnp.maximum(total - freedom, 1),
    }
