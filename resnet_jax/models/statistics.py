"""Batch statistics recomputed after training ("precise" batch normalisation)."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.errors import UserError


def precise_batch_stats(
    model: nn.Module, variables: dict[str, Any], batches: Iterable[jax.Array]
) -> Any:
    """The statistics of batch normalisation as a plain average over batches.

    A moving average remembers weights that have changed since, and few batches; the
    authors' released models were evaluated with averages over a large sample instead.
    Each batch counts the same, and is normalised by its own statistics as in training
    (``batch_norm_groups`` included); dropout and stochastic depth are off.

    Args:
      model: a net with the field ``batch_norm_momentum``.
      variables: its params and batch_stats.
      batches: images (n, h, w, c), normalised as the net expects them; of one shape,
        for each new shape compiles anew.

    Returns:
      New ``batch_stats``, float32.

    Raises:
      UserError: the net has no batch normalisation, or there is no batch.
    """
    names = {field.name for field in dataclasses.fields(model)}
    if "batch_norm_momentum" not in names or not variables.get("batch_stats"):
        raise UserError(f"{type(model).__name__} has no batch statistics to recompute")
    # With momentum 0 the running statistics are those of the one batch.
    options: dict[str, Any] = {"batch_norm_momentum": 0.0}
    options |= {
        name: 0.0 for name in ("dropout_rate", "stochastic_depth_rate") if name in names
    }
    sampler = model.clone(**options)

    @jax.jit
    def add(total, variables, images):
        _, updates = sampler.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        return jax.tree.map(jnp.add, total, updates["batch_stats"])

    total = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    count = 0
    for images in batches:
        total = add(total, variables, images)
        count += 1
    if not count:
        raise UserError("batch statistics cannot be averaged over no batches")
    return jax.tree.map(lambda leaf: leaf / count, total)
