"""The configuration of a run.

A config file's ``get_config(arg)`` starts from ``default_config()``, an
``ml_collections.ConfigDict``, and sets what differs. ``resolve`` turns it into a
``Config`` of frozen dataclasses, or says in one sentence what is wrong with it. The
rest of the library reads ``Config`` alone.
"""

from resnet_jax.config.build import build_model
from resnet_jax.config.derive import Derived, derive
from resnet_jax.config.resolve import load_config, model_options, resolve
from resnet_jax.config.schema import (
    Config,
    Field,
    default_config,
    describe_type,
    fields,
    flatten,
)

__all__ = [
    "Config",
    "Derived",
    "Field",
    "build_model",
    "default_config",
    "derive",
    "describe_type",
    "fields",
    "flatten",
    "load_config",
    "model_options",
    "resolve",
]
