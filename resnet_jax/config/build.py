"""The net of a config."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.config.schema import ModelConfig
from resnet_jax.models import create_model


def build_model(config: ModelConfig, num_classes: int | None) -> nn.Module:
    """The net of a config's ``model`` section, its frozen parts frozen."""
    model = create_model(
        config.name,
        num_classes=num_classes,
        dtype=jnp.dtype(config.dtype),
        **model_options(config),
    )
    frozen = config.frozen_statistics or config.frozen
    if frozen and hasattr(model, "batch_norm_frozen"):
        model = model.clone(batch_norm_frozen=frozen)
    return model


def model_options(config: ModelConfig) -> dict[str, Any]:
    """The keyword arguments of ``create_model`` that a config sets.

    Options at their default are left out: not every net has all of them.
    """
    others = {"name", "dtype", "weights", "new_head", "frozen", "frozen_statistics"}
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in others and getattr(config, field.name) != field.default
    }
