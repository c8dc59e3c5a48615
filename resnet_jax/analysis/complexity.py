"""Parameters and multiply-adds, counted from the traced program."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def count_parameters(params: Any) -> int:
    """The number of trainable numbers in a tree of (abstract) arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def abstract_variables(model: nn.Module, image_shape: tuple[int, ...]) -> Any:
    """The shapes of a model's variables for images (h, w, c); computes nothing.

    The model is called as ``model(images, train=False)``.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(
        lambda key, x: model.init(key, x, train=False), jax.random.key(0), images
    )


def count_multiply_adds(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one image (h, w, c) through convolutions and dense layers.

    Taps on the zero padding count, as in the paper's Table 1. Normalisation,
    activation, pooling and additions do not. Of branches the dearest counts.

    Raises:
      ValueError: a loop whose length is not known when the program is traced.
    """
    variables = abstract_variables(model, image_shape)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    traced = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(
        variables, images
    )
    return _multiply_adds(traced.jaxpr)


def _multiply_adds(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_features = equation.params["dimension_numbers"].rhs_spec[0]
            taps = math.prod(kernel) // kernel[out_features]
            total += math.prod(equation.outvars[0].aval.shape) * taps
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            taps = math.prod(shape[axis] for axis in contracted)
            total += math.prod(equation.outvars[0].aval.shape) * taps
        inner = [_multiply_adds(nested) for nested in _inner(equation)]
        if equation.primitive.name == "while" and any(inner):
            raise ValueError("the multiply-adds of a while loop are not known")
        if equation.primitive.name == "cond":
            total += max(inner)
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inner)
        else:
            total += sum(inner)
    return total


def _inner(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner
