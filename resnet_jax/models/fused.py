"""y = relu(batch_norm(x) + shortcut): plainly, and with a gradient that reads less.

Both forms normalise each group of the batch by its own statistics. The plain form uses
automatic differentiation and defines the result.

The fused form keeps the convolution's output x and a few numbers per channel, and
normalises x again in the backward pass. The ReLU's mask needs no further map: without a
shortcut it is recomputed from x; with one it is the sign of y, which the next
convolution keeps anyway. The backward pass reads the maps twice, the minimum: both sums
over a group must be known before any element of the gradient.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Form(NamedTuple):
    """The options of the computation.

    Attributes:
      epsilon: added to the variance.
      relu: whether negative values become zero, after the addition.
      dtype: of y.
    """

    epsilon: float = 1e-5
    relu: bool = False
    dtype: Any = jnp.float32


def batch_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of each group and channel, in one pass over x.

    With d = x - c, the variance is E[d^2] - E[d]^2. It loses the digits by which E[d]^2
    exceeds it, so c is a number near the mean: the mean of the pixels in the middle of
    each map. Without c, a mean of 100 and a deviation of 0.01 leave nothing of the
    variance in float32. The worst case is one outlier, in the middle: an error of about
    h w / 10^7 of the variance.

    x is (groups, n, ..., c); both results are (groups, 1, ..., c), in float32 at least.
    """
    axes = _reduced(x)
    middle = [slice(size // 2, size // 2 + 1) for size in x.shape[2:-1]]
    pixels = widen(x[:, :, *middle])
    # Divided before the sum, because GPUs then need one kernel instead of two.
    near = lax.stop_gradient((pixels / x.shape[1]).sum(axes, keepdims=True))
    offset = widen(x) - near
    mean = offset.mean(axes, keepdims=True)
    square = jnp.square(offset).mean(axes, keepdims=True)
    return near + mean, jnp.maximum(square - jnp.square(mean), 0)


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, in float32 at least."""
    mean, var, scale, bias = (along(array, x) for array in (mean, var, scale, bias))
    return (widen(x) - mean) * (lax.rsqrt(var + epsilon) * scale) + bias


def widen(x: jax.Array) -> jax.Array:
    """``x`` in float32, or in its own dtype if that is wider."""
    narrow = jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if narrow else x


def along(array: jax.Array, x: jax.Array) -> jax.Array:
    """``array`` with axes of length 1 in front, as many axes as ``x`` in all.

    jax can be set to refuse arrays of different ranks (jax_numpy_rank_promotion).
    """
    return lax.expand_dims(array, range(x.ndim - array.ndim))


def plain_batch_norm(
    x: jax.Array,
    shortcut: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    form: Form,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch normalisation by each group's statistics, addition and ReLU.

    x and the shortcut are (groups, n, ..., c), scale and bias (c,); a shortcut of None
    adds nothing. Returns y, of the shape of x, and mean and biased variance, (groups,
    1, ..., c).
    """
    mean, var = batch_moments(x)
    y = normalize(x, mean, var, scale, bias, form.epsilon).astype(form.dtype)
    y = y if shortcut is None else y + shortcut.astype(form.dtype)
    return jax.nn.relu(y) if form.relu else y, mean, var


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_batch_norm(
    x: jax.Array,
    shortcut: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    form: Form,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``plain_batch_norm`` with a custom gradient; see the module.

    In float32 both are equal up to rounding. In bfloat16 the sum with the shortcut is
    rounded once here and twice there. The gradient can be differentiated again; forward
    mode (``jax.jvp`` of the function itself) is not supported.
    """
    mean, var = batch_moments(x)
    y = normalize(x, mean, var, scale, bias, form.epsilon)
    y = y if shortcut is None else y + widen(shortcut)
    y = jnp.maximum(y, 0) if form.relu else y
    y = y.astype(form.dtype)
    if shortcut is not None:
        # XLA may skip the rounding where y is widened again. It would then keep the
        # sums of a stage in float32 too, or compute them anew from all maps before.
        y = lax.optimization_barrier(y)
    return y, mean, var


def _forward(x, shortcut, scale, bias, form):
    y, mean, var = fused_batch_norm(x, shortcut, scale, bias, form)
    joined = None if shortcut is None else y
    return (y, mean, var), (x, joined, mean, var, scale, bias)


def _backward(form, saved, cotangents):
    """The gradient with respect to x, shortcut, scale and bias.

    With d = x - mean, s = 1 / sqrt(var + epsilon), g the gradient of the ReLU's input
    and m values in a group, the gradient of x is

        scale s (g - sum(g) / m - d s^2 sum(g d) / m)

    plus the gradients that arrive through the mean and the variance, 1 / m and 2 d / m:
    a combination of g and d with coefficients per channel.
    """
    x, joined, mean, var, scale, bias = saved
    gradient, mean_gradient, var_gradient = cotangents
    inverse = lax.rsqrt(var + form.epsilon)
    slope = inverse * along(scale, x)

    def read(x, gradient):
        """The deviations, and the gradient before the ReLU."""
        deviation = widen(x) - mean
        if form.relu:
            # XLA fuses this form of the comparison with every sum that needs it.
            above, floor = deviation * slope, -along(bias, x)
            positive = above > floor if joined is None else joined > 0
            # Mask before widening: several consumers then share the narrow array.
            gradient = jnp.where(positive, gradient, 0)
        return deviation, gradient

    # The barriers keep XLA from storing the mask or the masked gradient, and from
    # adding up the groups' sums by another pass over the map.
    deviation, masked = read(*lax.optimization_barrier((x, gradient)))
    shortcut_gradient = None if joined is None else masked.astype(joined.dtype)
    axes = _reduced(x)
    total = widen(masked).sum(axes, keepdims=True)
    moment = (widen(masked) * deviation).sum(axes, keepdims=True)
    x, gradient, total, moment = lax.optimization_barrier((x, gradient, total, moment))
    if joined is None:
        deviation, masked = read(x, gradient)
    count = math.prod(x.shape[axis] for axis in axes)
    tilt = (2 * var_gradient - slope * jnp.square(inverse) * moment) / count
    constant = (mean_gradient - slope * total) / count
    x_gradient = slope * widen(masked) + tilt * deviation + constant
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
