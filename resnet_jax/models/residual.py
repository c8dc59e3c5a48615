"""Residual and highway connections around any Flax module.

They bring the idea of ``models.blocks`` to any architecture::

    x = Residual(nn.Dense(256))(x)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.models.conv import he_normal
from resnet_jax.models.factories import ModuleFactory


class Residual(nn.Module):
    """y = activation(norm(F(x)) + W_s x), after equations 1 and 2 of He et al. 2015.

    If F keeps the shape of its input, W_s is the identity and has no parameters.
    Otherwise W_s is a strided 1x1 convolution in any number of dimensions: it
    subsamples every axis between the batch and the channels by the stride that the
    sizes of x and F(x) imply, and multiplies the channels by a learned matrix.

    The variables are ``norm``, ``shortcut`` and the layer's. As everywhere in Linen, a
    layer created in a module's compact method stores its variables in that module. With
    ``parent=None`` among its arguments it stores them in the Residual, as ``layer``.

    Attributes:
      layer: F: a Linen module, or any function of an array.
      norm: factory of a normalisation of F(x), ``norm(name=...)``, or None.
      activation: applied to the sum, or None.
      project: False permits the identity only.
      dtype: of the projection, the sum and the output; by default the promoted dtype of
        x and F(x). Parameters are float32.
    """

    layer: Callable[..., Any]
    norm: ModuleFactory | None = None
    activation: Callable[[jax.Array], jax.Array] | None = None
    project: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Adds the shortcut to ``layer(x, *args, **kwargs)``.

        x is (n, ..., c), or (c,) without a batch.

        Raises:
          ValueError: no projection fits the shapes of x and F(x).
        """
        y = self.layer(x, *args, **kwargs)
        if self.norm is not None:
            y = self.norm(name="norm")(y)
        dtype = self.dtype or jnp.promote_types(x.dtype, y.dtype)
        shortcut = x.astype(dtype)
        if x.shape != y.shape:
            strides = self._strides(x.shape, y.shape)
            options: dict[str, Any] = {
                "use_bias": False,
                "dtype": dtype,
                "kernel_init": he_normal,
            }
            project = nn.Dense(y.shape[-1], name="shortcut", **options)
            places = tuple(slice(None, None, stride) for stride in strides)
            shortcut = project(shortcut[places])
        y = y.astype(dtype) + shortcut
        return y if self.activation is None else self.activation(y)

    def _strides(self, before, after):
        """The stride of every axis but the last, 1 for the batch."""
        changed = f"the layer turns the shape {before} into {after}"
        if not self.project:
            raise ValueError(
                f"{changed}, but project=False permits only the identity: keep the "
                "shape, or set project=True"
            )
        same_batch = len(before) == 1 or before[:1] == after[:1]
        if len(before) != len(after) or not same_batch:
            raise ValueError(
                f"{changed}, but a projection cannot change the number of axes or the "
                "first axis (the batch)"
            )
        strides = []
        for axis, size in enumerate(before[:-1]):
            new_size = after[axis]
            # The smallest stride that does not keep too many places.
            stride = max(1, -(-size // max(new_size, 1)))
            if -(-size // stride) != new_size:
                raise ValueError(
                    f"{changed}, but no stride s subsamples axis {axis} from {size} to "
                    f"{new_size}: that is {size} / s, rounded up. Change the layer's "
                    "padding or stride"
                )
            strides.append(stride)
        return strides


class Highway(nn.Module):
    """y = H(x) T(x) + x (1 - T(x)), T(x) = sigmoid(gate(x)) (Srivastava et al. 2015).

    The gate decides how much of each element is transformed and how much is carried
    over. Start its bias between -1 and -4, so that a deep net starts close to the
    identity: ``nn.Dense(256, bias_init=nn.initializers.constant(-2.0))``.

    The variables are ``layer`` and ``gate``, stored as in ``Residual``.

    Attributes:
      layer: H: a Linen module, or any function of an array.
      gate: the same for T, without its sigmoid.
    """

    layer: Callable[..., Any]
    gate: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Calls ``layer(x, *args, **kwargs)`` and ``gate(x)``.

        x has any shape, and the result has the same.

        Raises:
          ValueError: the layer or the gate changes the shape.
        """
        transformed = self.layer(x, *args, **kwargs)
        gate = self.gate(x)
        for name, array in (("layer", transformed), ("gate", gate)):
            if array.shape != x.shape:
                raise ValueError(
                    f"the highway's {name} turns the shape {x.shape} into "
                    f"{array.shape}, but must keep it: change the number of channels "
                    "before the highway layer"
                )
        gate = nn.sigmoid(gate)
        return transformed * gate + x * (1 - gate)


class HighwayLayer(nn.Module):
    """A highway layer of two like layers: ``transform``, with ReLU, and ``gate``.

    Attributes:
      layer: factory of both, ``layer(features, name=...)``.
      gate_bias: initial value of the gate's bias.
    """

    layer: ModuleFactory
    gate_bias: float = -2.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, ..., c) to the same."""
        layer = functools.partial(self.layer, x.shape[-1])
        transform = nn.Sequential([layer(name="transform"), nn.relu])
        gate_bias = nn.initializers.constant(self.gate_bias)
        return Highway(transform, layer(bias_init=gate_bias, name="gate"))(x)
