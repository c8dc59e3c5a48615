"""The net of a config, and its optimizer if that is one of optax."""

import ast
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn

from resnet_jax.config.schema import OPTIMIZERS, ModelConfig, OptimizerConfig
from resnet_jax.errors import UserError, nearest
from resnet_jax.models import create_model
from resnet_jax.options import ModelOptions


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


def model_options(config: ModelOptions) -> dict[str, Any]:
    """The keyword arguments of ``create_model`` that a config sets.

    Options at their default are left out: not every net has all of them.
    """
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(ModelOptions)
        if field.name not in ("name", "dtype")
        and getattr(config, field.name) != field.default
    }


def build_optax(
    config: OptimizerConfig, mask: Any = None, learning_rate: float = 1.0
) -> Any:
    """The optimizer of optax that a config names.

    Args:
      config: its ``kind`` is a function of optax.
      mask: of the parameters that decay, as optax takes it; None means all.
      learning_rate: the step multiplies the update by its own.

    Raises:
      UserError: optax has no such optimizer, or that lacks an argument.
    """
    kind, factories = config.kind, optax_optimizers()
    if kind not in factories:
        raise UserError(
            f"optimizer.kind is {', '.join(OPTIMIZERS)} or an optimizer of optax, not "
            f"{kind!r}; {nearest(kind, [*OPTIMIZERS, *factories])}"
        )
    known = set(inspect.signature(factories[kind]).parameters)
    free = known - {"learning_rate", "weight_decay", *_MASKS}
    given = dict(map(_argument, config.arguments))
    for name in given:
        if name not in free:
            raise UserError(
                f"optimizer.arguments of optax.{kind} are {', '.join(sorted(free))}, "
                f"not {name}"
            )
    if "weight_decay" in known:
        given["weight_decay"] = config.weight_decay
    elif config.weight_decay:
        raise UserError(
            f"optax.{kind} has no weight decay: set optimizer.weight_decay=0, or take "
            "an optimizer that has, such as adamw"
        )
    masks = [name for name in _MASKS if name in known]
    if masks:
        given[masks[0]] = mask
    elif config.weight_decay and config.weight_decay_scope != "all":
        raise UserError(
            f"optax.{kind} decays all parameters: set optimizer.weight_decay_scope=all"
        )
    try:
        return factories[kind](learning_rate, **given)
    except (TypeError, ValueError) as error:
        raise UserError(f"optax.{kind} refuses optimizer.arguments: {error}") from error


_MASKS = ("mask", "weight_decay_mask")


def optax_optimizers() -> dict[str, Callable[..., Any]]:
    """The optimizers of optax, by name: functions of a learning rate first."""
    functions = inspect.getmembers(optax, inspect.isfunction)
    return {
        name: function
        for name, function in functions
        if next(iter(inspect.signature(function).parameters), "") == "learning_rate"
        and not name.startswith(("_", "scale_"))
        and name not in OPTIMIZERS
    }


def _argument(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``; a value that is no Python literal is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"optimizer.arguments takes NAME=VALUE, not {text!r}")
    literal = {"true": "True", "false": "False"}.get(value.lower(), value)
    try:
        return name, ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        return name, value
