"""The configuration of a run.

A config file's ``get_config(arg)`` starts from ``default_config()``, an
``ml_collections.ConfigDict``, and sets what differs. ``resolve`` turns it into a
``Config`` of frozen dataclasses, or raises a one-sentence UserError. The rest of the
library reads only ``Config``. The import needs no jax, so that commands answer at once.
"""

from resnet_jax.config.derive import Derived, derive
from resnet_jax.config.detection import DetectionConfig
from resnet_jax.config.files import list_configs
from resnet_jax.config.resolve import (
    load_config,
    nearest_field,
    override,
    parse,
    resolve,
)
from resnet_jax.config.schema import Config, default_config, fields, flatten
from resnet_jax.options import Field, describe_range, describe_type

__all__ = [
    "Config",
    "Derived",
    "DetectionConfig",
    "Field",
    "default_config",
    "derive",
    "describe_range",
    "describe_type",
    "fields",
    "flatten",
    "list_configs",
    "load_config",
    "nearest_field",
    "override",
    "parse",
    "resolve",
]
