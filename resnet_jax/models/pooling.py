"""Max-pooling and averages of maps, also of maps that are padded."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from resnet_jax.models.barriers import apart
from resnet_jax.models.fused import widen


class Pool(nn.Module):
    """A pooling function as a module, so that ``models.masking`` sees its calls.

    Attributes:
      function: ``function(x, sizes=None)``, one of this module with its options bound.
      rounds_down: whether it halves maps without padding, so that an odd side loses a
        pixel.
    """

    function: Callable[..., jax.Array]
    rounds_down: bool = False

    def __call__(self, x: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
        """Pools maps (n, h, w, c); see ``inside`` for ``sizes``."""
        return self.function(x, sizes=sizes)


def inside(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """Which pixels of padded maps belong to the images: bool (n, h, w, 1).

    Args:
      x: maps (n, h, w, c), each padded below and to the right.
      sizes: integers (n, 2), height and width of each map without its padding.
    """
    rows, columns = (jnp.arange(side, dtype=sizes.dtype) for side in x.shape[1:3])
    rows = rows[None, :, None] < sizes[:, 0, None, None]
    columns = columns[None, None, :] < sizes[:, 1, None, None]
    return (rows & columns)[..., None]


def max_pool(
    x: jax.Array,
    size: int,
    padding: int = 0,
    by_hand: bool = False,
    sizes: jax.Array | None = None,
) -> jax.Array:
    """Max-pooling of stride 2 over size x size pixels, padded on every side.

    ``by_hand`` computes the 3x3 pooling by ``max_pool_3x3``. For ``sizes`` see
    ``inside``.
    """
    if sizes is not None:
        x = jnp.where(inside(x, sizes), x, -jnp.inf)
    if by_hand:
        return max_pool_3x3(x)
    return apart(_max_pool(apart(x), size, padding))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _max_pool(x: jax.Array, size: int, padding: int) -> jax.Array:
    """The pooling of inference; its derivative is that of ``_windows``."""
    return lax.platform_dependent(
        x,
        cpu=functools.partial(_slices, size=size, padding=padding),
        default=functools.partial(_windows, size=size, padding=padding),
    )


@_max_pool.defjvp
def _max_pool_jvp(size, padding, primals, tangents):
    pool = functools.partial(_windows, size=size, padding=padding)
    return jax.jvp(pool, primals, tangents)


def _windows(x, size, padding):
    """XLA's pooling."""
    return nn.max_pool(x, (size, size), (2, 2), ((padding, padding),) * 2)


def _slices(x, size, padding):
    """The same values as the largest of size x size slices, which XLA:CPU vectorises.

    The pooling of ResNet-50 at 224 x 224 then takes a third of the time.
    """
    lowest = jnp.array(-jnp.inf, x.dtype)
    x = lax.pad(x, lowest, ((0, 0, 0), *[(padding, padding, 0)] * 2, (0, 0, 0)))
    rows, columns = ((side - size) // 2 * 2 + 1 for side in x.shape[1:3])
    return functools.reduce(
        jnp.maximum,
        (
            x[:, i : i + rows : 2, j : j + columns : 2]
            for i in range(size)
            for j in range(size)
        ),
    )


def global_average(x: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
    """Means over the map: (n, h, w, c) to (n, c), float32 at least.

    A bfloat16 sum would lose small terms. For ``sizes`` see ``inside``.
    """
    wide = widen(apart(x))
    if sizes is None:
        return wide.mean((1, 2))
    total = jnp.where(inside(x, sizes), wide, 0).sum((1, 2))
    return total / jnp.prod(sizes, axis=-1, dtype=total.dtype)[:, None]


def average_pool(
    x: jax.Array,
    window: int,
    strides: int,
    dilation: int = 1,
    sizes: jax.Array | None = None,
) -> jax.Array:
    """Means over windows of ``window`` x ``window`` pixels.

    (n, h, w, c) to (n, ceil(h / strides), ceil(w / strides), c). Windows that reach
    over the edge average the pixels inside the map. For ``sizes`` see ``inside``.
    """
    height, width = (-(-side // strides) for side in x.shape[1:3])
    reach = (window - 1) * dilation
    counted = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    if sizes is not None:
        counted = inside(x, sizes).astype(x.dtype)
        x = jnp.where(counted, x, 0)

    def window_sum(maps):
        padded = jnp.pad(maps, ((0, 0), (0, reach), (0, reach), (0, 0)))
        offsets = range(0, reach + 1, dilation)
        rows, columns = (height - 1) * strides + 1, (width - 1) * strides + 1
        return sum(
            padded[:, top : top + rows : strides, left : left + columns : strides]
            for top in offsets
            for left in offsets
        )

    count = window_sum(counted)
    return window_sum(x) / (count if sizes is None else jnp.maximum(count, 1))


def adaptive_average_pool(
    x: jax.Array, size: int, sizes: jax.Array | None = None
) -> jax.Array:
    """Means over ``size`` x ``size`` bins that cover the map, as torch defines them.

    (n, h, w, c) to (n, size, size, c) in the dtype of ``x``, averaged in float32 or
    wider. Along an axis of h pixels, bin i holds those from floor(i h / size) to
    ceil((i + 1) h / size), the latter excluded. For ``sizes`` see ``inside``.
    """
    if sizes is None and x.shape[1:3] == (size, size):
        return x
    pooled = widen(apart(x))
    if sizes is None:
        sizes = jnp.array(x.shape[1:3], jnp.int32)[None]
    else:
        pooled = jnp.where(inside(x, sizes), pooled, 0)
    # Bins are rectangles: averaging rows, then columns, averages the pixels.
    for axis in (1, 2):
        length = sizes[:, axis - 1, None]
        places = jnp.arange(size, dtype=sizes.dtype)[None]
        start, stop = places * length // size, -(-(places + 1) * length // size)
        pixels = jnp.arange(x.shape[axis], dtype=sizes.dtype)[None, None]
        belongs = (start[..., None] <= pixels) & (pixels < stop[..., None])
        counts = (stop - start)[..., None].astype(pooled.dtype)
        shares = belongs.astype(pooled.dtype) / counts
        shares = jnp.broadcast_to(shares, (len(x), *shares.shape[1:]))
        pooled = jnp.einsum(
            "nbp,np...->nb...",
            shares,
            jnp.moveaxis(pooled, axis, 1),
            precision="highest",
        )
        pooled = jnp.moveaxis(pooled, 1, axis)
    return pooled.astype(x.dtype)


@jax.custom_vjp
def max_pool_3x3(x: jax.Array) -> jax.Array:
    """3x3 max-pooling of stride 2, padded by one pixel on every side.

    (n, h, w, c) to (n, ceil(h / 2), ceil(w / 2), c). Values and gradients equal XLA's:
    the first of equal values in a window gets the gradient. (Where a window holds NaN,
    only the values are equal.) The forward pass keeps one byte per output, the place of
    the largest value; XLA's gradient keeps the map, searches it again and scatters.
    Forward mode (``jax.jvp``) is not supported.
    """
    return _largest(x)[0]


def _largest(x):
    """The largest value of each window, and its place, 4 row + column (uint8)."""
    height, width = (-(-size // 2) for size in x.shape[1:3])
    lowest = jnp.array(-jnp.inf, x.dtype)
    padded = lax.pad(x, lowest, ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
    largest = jnp.full((len(x), height, width, x.shape[3]), lowest)
    place = jnp.zeros(largest.shape, jnp.uint8)
    for row, column in itertools.product(range(3), range(3)):
        value = padded[:, row : row + 2 * height - 1 : 2]
        value = value[:, :, column : column + 2 * width - 1 : 2]
        place = jnp.where(value > largest, jnp.uint8(4 * row + column), place)
        largest = jnp.maximum(largest, value)  # Keeps NaN.
    return largest, place


def _forward(x):
    largest, place = _largest(x)
    return largest, (place, x.shape)


def _backward(saved, gradient):
    """The gradient of each input: a sum over the windows that hold it, at most four.

    The input is cut into squares of 2 x 2 pixels, one for each window. Pixel (i, j) of
    a square is at row i + 1 and column j + 1 of its window, and two less in the window
    below or to the right. A row or column of -1 equals no place.
    """
    place, (n, height, width, channels) = saved
    rows, columns = place.shape[1:3]
    i = jnp.arange(2, dtype=jnp.int32).reshape(1, 1, 2, 1, 1, 1)
    j = i.reshape(1, 1, 1, 1, 2, 1)
    total: Any = 0
    for down, right in itertools.product(range(2), range(2)):
        here = 4 * (i + 1 - 2 * down) + j + 1 - 2 * right
        there = _neighbor(place, down, right).astype(jnp.int32)
        part = jnp.where(there == here, _neighbor(gradient, down, right), 0)
        total += widen(part)
    # One axis at a time, as meshes with explicit axes need it.
    total = total.reshape(n, 2 * rows, columns, 2, channels)
    total = total.reshape(n, 2 * rows, 2 * columns, channels)
    return (total[:, :height, :width].astype(gradient.dtype),)


def _neighbor(maps, down, right):
    """Each pixel's neighbour, ``down`` and ``right`` of it: to (n, h, 1, w, 1, c)."""
    around = ((0, 0, 0), (-down, down, 0), (-right, right, 0), (0, 0, 0))
    zero = jnp.zeros((), maps.dtype)
    return lax.pad(maps, zero, around)[:, :, None, :, None]


max_pool_3x3.defvjp(_forward, _backward)
