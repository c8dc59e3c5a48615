"""The net of a config."""

import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.config.resolve import model_options
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
    if config.frozen and hasattr(model, "batch_norm_frozen"):
        model = model.clone(batch_norm_frozen=config.frozen)
    return model
