"""Max-pooling: XLA's, and with a gradient by hand for ``BatchNorm.fused``."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from resnet_jax.models.fused import widen

_TAPS = [(row, column) for row in range(3) for column in range(3)]


def apart(x: jax.Array) -> jax.Array:
    """``x``, which XLA:CPU does not fuse with what follows if it is a narrow float.

    From jaxlib 0.11 on, XLA:CPU fuses a reduction or pooling with the layers around it.
    Two bfloat16 ReLUs in one such fusion return garbage and NaN. Programs for other
    backends and in float32 do not change.
    """
    if jnp.finfo(x.dtype).bits < 32 and jax.default_backend() == "cpu":
        return lax.optimization_barrier(x)
    return x


def max_pool(x: jax.Array, size: int, padding: int = 0) -> jax.Array:
    """Max-pooling of stride 2 over size x size pixels, padded on every side."""
    sides = ((padding, padding),) * 2
    return apart(nn.max_pool(apart(x), (size, size), (2, 2), sides))


@jax.custom_vjp
def max_pool_3x3(x: jax.Array) -> jax.Array:
    """3x3 max-pooling of stride 2, padded by one pixel on every side.

    (n, h, w, c) to (n, ceil(h / 2), ceil(w / 2), c). Values and gradients equal XLA's:
    the first of equal values in a window gets the gradient. The forward pass keeps one
    byte per output, the place of the largest value; XLA's gradient keeps the map,
    searches it again and scatters. Forward mode (``jax.jvp``) is not supported.
    """
    return _largest(x)[0]


def _largest(x):
    """The largest value of each window, and its place among the nine (uint8)."""
    height, width = (-(-size // 2) for size in x.shape[1:3])
    lowest = jnp.array(-jnp.inf, x.dtype)
    padded = lax.pad(x, lowest, ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
    values = [
        lax.slice(
            padded,
            (0, row, column, 0),
            (len(x), row + 2 * height - 1, column + 2 * width - 1, x.shape[3]),
            (1, 2, 2, 1),
        )
        for row, column in _TAPS
    ]
    largest, place = values[0], jnp.zeros(values[0].shape, jnp.uint8)
    for index, value in enumerate(values[1:], start=1):
        place = jnp.where(value > largest, jnp.uint8(index), place)
        largest = jnp.maximum(largest, value)  # Keeps NaN.
    return largest, place


def _forward(x):
    largest, place = _largest(x)
    return largest, (place, x.shape)


def _backward(saved, gradient):
    """The gradient of each input: a sum over the windows that hold it, at most four."""
    place, shape = saved
    wide = widen(gradient)
    zero = jnp.zeros((), wide.dtype)
    total = jnp.zeros(shape, wide.dtype)
    for index, (row, column) in enumerate(_TAPS):
        part = jnp.where(place == index, wide, 0)
        # Every second pixel from the tap's place on; pixels outside are padding.
        around = [
            (tap - 1, size + 2 - tap - 2 * outputs, 1)
            for tap, size, outputs in zip(
                (row, column), shape[1:3], gradient.shape[1:3], strict=True
            )
        ]
        total += lax.pad(part, zero, ((0, 0, 0), *around, (0, 0, 0)))
    return (total.astype(gradient.dtype),)


max_pool_3x3.defvjp(_forward, _backward)
