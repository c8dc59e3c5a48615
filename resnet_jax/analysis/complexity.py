"""Parameters and multiply-adds, counted from the traced program."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

Path = tuple[str, ...]
"""A module's path in its net, ("stage1", "block2"); () is the net itself."""

_MARK = re.compile(r"resnet_jax_module_(\d+)")


@dataclasses.dataclass(frozen=True)
class Program:
    """A model's computation for one image, with the module of each equation.

    Attributes:
      jaxpr: a function of the variables' leaves and the image (1, h, w, c).
      variables: shapes and dtypes.
      paths: modules in the order of their first call, outer before inner.
    """

    jaxpr: Any
    variables: Any
    paths: tuple[Path, ...]

    def computed_by(self, equation: Any) -> Path | None:
        """The innermost module around an equation.

        None in inner programs (a jit, a loop) that belong to the module around the
        outer equation.
        """
        marks = _MARK.findall(str(equation.source_info.name_stack))
        return self.paths[int(marks[-1])] if marks else None

    def returned_by(self, equation: Any) -> Path | None:
        """The module whose return value the equation names, if any."""
        match = _MARK.fullmatch(str(equation.params.get("name", "")))
        return self.paths[int(match[1])] if match else None


def count_parameters(params: Any) -> int:
    """The number of elements in a tree of (abstract) arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def abstract_variables(model: nn.Module, image_shape: tuple[int, ...]) -> Any:
    """The shapes of a model's variables for images (h, w, c); computes nothing.

    The model is called as ``model(images, train=False)``.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(
        lambda key, x: model.init(key, x, train=False), jax.random.key(0), images
    )


def trace(model: nn.Module, image_shape: tuple[int, ...]) -> Program:
    """The program of ``model(images, train=False)`` for one image (h, w, c)."""
    variables = abstract_variables(model, image_shape)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    indices: dict[Path, int] = {}

    # Flax's own scopes name methods too. These marks name modules alone, and survive
    # loops, branches and rematerialisation.
    def mark(method, args, kwargs, context):
        if context.module.scope is None:
            return method(*args, **kwargs)
        index = indices.setdefault(context.module.path, len(indices))
        name = f"resnet_jax_module_{index}"
        with jax.named_scope(name):
            return jax.tree.map(
                lambda x: checkpoint_name(x, name) if isinstance(x, jax.Array) else x,
                method(*args, **kwargs),
            )

    def apply(variables, images):
        with nn.intercept_methods(mark):
            return model.apply(variables, images, train=False)

    traced = jax.make_jaxpr(apply)(variables, images)
    return Program(traced.jaxpr, variables, tuple(indices))


def count_multiply_adds(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one image (h, w, c) through convolutions and dense layers.

    Counts taps on the zero padding, as the paper's Table 1 does, and the costliest
    branch of a cond. Leaves out normalisation, activation, pooling and additions.

    Raises:
      ValueError: a loop of unknown length.
    """
    return multiply_adds_by_module(trace(model, image_shape)).total()


def multiply_adds_by_module(program: Program) -> collections.Counter[Path]:
    """The multiply-adds of ``count_multiply_adds`` by innermost module.

    Raises:
      ValueError: a loop of unknown length.
    """
    return _multiply_adds(program, program.jaxpr, ())


def inner_programs(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation calls: of a jit, a loop, the branches of a cond."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def _multiply_adds(program, jaxpr, caller):
    total: collections.Counter[Path] = collections.Counter()
    for equation in jaxpr.eqns:
        path = program.computed_by(equation)
        path = caller if path is None else path
        total[path] += own_multiply_adds(equation)
        inner = [
            _multiply_adds(program, nested, path) for nested in inner_programs(equation)
        ]
        if equation.primitive.name == "while" and any(part.total() for part in inner):
            raise ValueError("the multiply-adds of a while loop are not known")
        if equation.primitive.name == "cond":
            inner = [max(inner, key=collections.Counter.total)]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for part in inner:
            for inner_path, count in part.items():
                total[inner_path] += times * count
    return total


def own_multiply_adds(equation: Any) -> int:
    """Multiply-adds of a convolution or matrix product; 0 for anything else."""
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = equation.params["dimension_numbers"].rhs_spec[0]
        taps = math.prod(kernel) // kernel[out_features]
    elif equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        taps = math.prod(shape[axis] for axis in contracted)
    else:
        return 0
    return math.prod(equation.outvars[0].aval.shape) * taps
