"""y = relu(batch_norm(x) + shortcut): plainly, and with a gradient that reads less.

Both forms normalise each group of the batch by its own statistics. The plain one is
left to automatic differentiation; it says what the other computes, and tests hold the
two together.

The fused one keeps the convolution's output x and numbers per channel, and normalises x
again in the backward pass. What ReLU let through is taken from what is read anyway or
kept anyway: without a shortcut the sign is computed again from x, and no other map is
read; with one it is the sign of y, which lives on as the next convolution's input and
is one map to read, as the shortcut would be. The backward pass goes over the maps
twice, which is the least: both sums over a group have to be known before the first
element of the gradient is.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

VARIANCES = ("two_pass", "fast")
ARITHMETICS = ("wide", "narrow")

RECOMPUTES_MASK = False
"""Whether the fused gradient without a shortcut computes ReLU's mask twice."""


class Form(NamedTuple):
    """What is computed, beside the arrays.

    Attributes:
      epsilon: added to the variance.
      variance: "two_pass" or "fast", see ``batch_moments``.
      relu: whether negative values become zero, after the addition.
      dtype: of y.
      arithmetic: of maps: "wide" is float32 at least, see ``normalize``; "narrow" is
        the dtype of y, see ``normalize_narrow``. Statistics are float32 in both.
    """

    epsilon: float = 1e-5
    variance: str = "two_pass"
    relu: bool = False
    dtype: Any = jnp.float32
    arithmetic: str = "wide"


def batch_moments(
    x: jax.Array, variance: str = "two_pass"
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of each group and channel, in float32 at least.

    "two_pass" is the mean of squared deviations: never negative, and right whatever the
    mean. "fast" is E[x^2] - E[x]^2, at least zero: both moments come from one pass over
    x instead of two. It loses as many digits as the squared mean is larger than the
    variance: a mean of 100 and a standard deviation of 0.01, a ratio of 10^8, are more
    than float32's seven digits, and nothing of the variance is left.

    Args:
      x: (groups, n, ..., c).
      variance: one of ``VARIANCES``.

    Returns:
      Two arrays (groups, 1, ..., c).

    Raises:
      ValueError: an unknown form of the variance.
    """
    if variance not in VARIANCES:
        raise ValueError(
            f"the variance is one of {', '.join(VARIANCES)}, not {variance!r}"
        )
    axes, wide = _reduced(x), widen(x)
    mean = wide.mean(axes, keepdims=True)
    if variance == "fast":
        square = jnp.square(wide).mean(axes, keepdims=True)
        return mean, jnp.maximum(square - jnp.square(mean), 0)
    return mean, jnp.square(wide - mean).mean(axes, keepdims=True)


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, in float32 at least."""
    return (widen(x) - mean) * (lax.rsqrt(var + epsilon) * scale) + bias


def normalize_narrow(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    dtype: Any,
) -> jax.Array:
    """``normalize`` as x a + b in ``dtype``, a and b computed in float32 and rounded.

    In bfloat16 a, b, the product and the sum are each rounded to eight bits: the result
    is off by up to 2^-7 of the mean's size in standard deviations, beside its own
    rounding.
    """
    slope = lax.rsqrt(var + epsilon) * scale
    offset = bias - mean * slope
    # Repeated before they are rounded, so that their gradients are summed in float32.
    slope, offset = (
        jnp.broadcast_to(number, x.shape).astype(dtype) for number in (slope, offset)
    )
    return x.astype(dtype) * slope + offset


def widen(x: jax.Array) -> jax.Array:
    """``x`` in float32, or in its own dtype if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def plain_batch_norm(
    x: jax.Array,
    shortcut: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    form: Form,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch normalisation by the groups' own statistics, addition and ReLU.

    Args:
      x: (groups, n, ..., c).
      shortcut: what is added, of the shape of x; None: nothing.
      scale: (c,).
      bias: (c,).
      form: see ``Form``.

    Returns:
      y, of the shape of x; the mean and the biased variance, (groups, 1, ..., c).
    """
    if form.arithmetic not in ARITHMETICS:
        raise ValueError(
            f"the arithmetic is one of {', '.join(ARITHMETICS)}, not "
            f"{form.arithmetic!r}"
        )
    mean, var = batch_moments(x, form.variance)
    numbers = (mean, var, scale, bias, form.epsilon)
    if form.arithmetic == "narrow":
        y = normalize_narrow(x, *numbers, form.dtype)
    else:
        y = normalize(x, *numbers).astype(form.dtype)
    y = y if shortcut is None else y + shortcut
    return jax.nn.relu(y) if form.relu else y, mean, var


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_batch_norm(
    x: jax.Array,
    shortcut: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    form: Form,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``plain_batch_norm`` with a gradient of its own; see the module.

    Its arithmetic is the wide one.

    In float32 both are equal to rounding. In bfloat16 the sum with the shortcut is
    rounded once here, at the end, and twice there. Its gradient can be differentiated
    again; forward mode (``jax.jvp`` of the function itself) has it not.
    """
    mean, var = batch_moments(x, form.variance)
    y = normalize(x, mean, var, scale, bias, form.epsilon)
    y = y if shortcut is None else y + widen(shortcut)
    y = jnp.maximum(y, 0) if form.relu else y
    return y.astype(form.dtype), mean, var


def _forward(x, shortcut, scale, bias, form):
    y, mean, var = fused_batch_norm(x, shortcut, scale, bias, form)
    joined = None if shortcut is None else y
    return (y, mean, var), (x, joined, mean, var, scale, bias)


def _backward(form, saved, cotangents):
    """The gradient with respect to x, shortcut, scale and bias.

    With d = x - mean, s = 1 / sqrt(var + epsilon), g the gradient behind the ReLU and
    m the values of a group, that of x is

        scale s (g - sum(g) / m - d s^2 sum(g d) / m)

    to which those of the mean and the variance, 1 / m and 2 d / m, are added: a
    combination of g and d whose coefficients are numbers per channel.
    """
    x, joined, mean, var, scale, bias = saved
    gradient, mean_gradient, var_gradient = cotangents
    inverse = lax.rsqrt(var + form.epsilon)
    slope = inverse * scale

    def read(x, gradient):
        """The deviations and the gradient before the ReLU, from the maps."""
        deviation = widen(x) - mean
        if form.relu:
            sign = deviation * slope + bias if joined is None else joined
            # Before it is widened: what is kept of it, for several readers, is narrow.
            gradient = jnp.where(sign > 0, gradient, 0)
        return deviation, gradient

    deviation, masked = read(x, gradient)
    shortcut_gradient = None if joined is None else masked.astype(joined.dtype)
    wide = widen(masked)
    axes = _reduced(x)
    total = wide.sum(axes, keepdims=True)
    moment = (wide * deviation).sum(axes, keepdims=True)
    count = math.prod(x.shape[axis] for axis in axes)
    along = (2 * var_gradient - slope * jnp.square(inverse) * moment) / count
    constant = (mean_gradient - slope * total) / count
    if RECOMPUTES_MASK and joined is None:
        # XLA would write the masked gradient for its two readers: three more passes.
        deviation, masked = read(*lax.optimization_barrier((x, gradient)))
        wide = widen(masked)
    x_gradient = slope * wide + along * deviation + constant
    others = tuple(range(x.ndim - 1))
    return (
        x_gradient.astype(x.dtype),
        shortcut_gradient,
        (moment * inverse).sum(others).astype(scale.dtype),
        total.sum(others).astype(bias.dtype),
    )


fused_batch_norm.defvjp(_forward, _backward)


def _reduced(x):
    """The axes of a group's values: all but the groups and the channels."""
    return tuple(range(1, x.ndim - 1))
