"""Convolutions with symmetric padding, computed as suits the device."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from resnet_jax.models.fused import along, widen
from resnet_jax.models.platforms import platform
from resnet_jax.options import ALGORITHMS

_BEST = {"cpu": "products", "gpu": "packed"}
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_COLUMNS = 4
"""Of the blocks of ``packed_convolve``."""
_IMAGE_CHANNELS = 4
"""To which it pads images."""


@dataclasses.dataclass(frozen=True)
class Initializer:
    """An initialiser of ``flax.linen.initializers`` by its name and arguments.

    Those of Flax are local functions, which ``pickle`` refuses in a model's fields.
    """

    name: str
    arguments: tuple[Any, ...] = ()

    def __call__(
        self, key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Draws an array."""
        return getattr(nn.initializers, self.name)(*self.arguments)(key, shape, dtype)


def variance_scaling(*arguments: Any) -> Initializer:
    """Flax's ``variance_scaling(scale, mode, distribution)``."""
    return Initializer("variance_scaling", arguments)


he_normal = variance_scaling(2.0, "fan_out", "normal")
"""He initialisation by fan-out, as in the authors' released code."""

INITIALIZATIONS: dict[str, Any] = {
    "he": he_normal,
    "he_fan_in": variance_scaling(2.0, "fan_in", "normal"),
    "xavier": Initializer("xavier_uniform"),
    "normal_0.01": Initializer("normal", (0.01,)),
}
"""He et al. 2015 (rectifiers) with either fan; Glorot & Bengio 2010; and one normal
distribution for all layers, as in Krizhevsky et al. 2012.
"""


class Conv(nn.Module):
    """A convolution with the same padding on every side, by default without bias.

    'SAME' pads a 3x3 of stride 2 on one side only, which shifts the maps by a pixel
    compared with torch and the original.

    Attributes:
      features: output channels.
      kernel_size: height and width, both odd.
      strides: of both axes.
      dilation: spacing of the taps, in pixels of the input.
      groups: parts of the channels that are convolved separately (ResNeXt).
      use_bias: whether to add a bias.
      kernel_init, bias_init: initialisers.
      dtype: of the computation; parameters are float32.
      algorithm: how to compute it, see ``convolve``; results agree up to rounding.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    dilation: int = 1
    groups: int = 1
    use_bias: bool = False
    kernel_init: Any = he_normal
    bias_init: Any = nn.initializers.zeros
    dtype: Any = jnp.float32
    algorithm: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) to (n, ceil(h / strides), ceil(w / strides), features)."""
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        options = (self.strides, self.dilation, self.groups, self.algorithm)
        y = convolve(x, kernel, *options)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
            y = y + along(bias.astype(self.dtype), y)
        return y


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: int = 1,
    dilation: int = 1,
    groups: int = 1,
    algorithm: str = "auto",
) -> jax.Array:
    """A two-dimensional convolution with symmetric padding.

    The algorithms agree up to rounding. "auto" is "products" on the CPU, "packed" on
    GPUs and "xla" elsewhere.

    - "xla" is XLA's convolution.
    - "packed" packs neighbouring pixels into channels where a bfloat16 map has too few
      channels for tensor cores; see ``packed_convolve``.
    - "products" writes a 1x1 convolution, and the gradient of a 3x3
      kernel, as matrix products: one for each tap. XLA's kernel gradients are slow
      on the CPU, where a training step of ResNet-50 then takes about 0.7 of the time
      (benchmarks/results).
    - "patches" writes a 3x3 convolution as one product, with the nine pixels of each
      output side by side: for loops on the CPU, see ``loop_algorithm``.

    x is (n, h, w, c), and the kernel (height, width, c / groups, features), with odd
    height and width. The options and the result are those of ``Conv``.

    Raises:
      ValueError: an unknown algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"the convolution's algorithm is one of {', '.join(ALGORITHMS)}, "
            f"not {algorithm!r}"
        )
    if algorithm == "auto":
        algorithm = _BEST.get(platform(), "xla")
    size = kernel.shape[:2]
    if (
        algorithm == "packed"
        and dilation == groups == 1
        and is_packable(x, kernel, strides)
    ):
        return packed_convolve(x, kernel, strides)
    if algorithm in ("products", "patches") and groups == 1:
        if size == (1, 1):
            return jnp.dot(x[:, ::strides, ::strides, :], kernel[0, 0])
        if size == (3, 3) and algorithm == "patches":
            return _patches_convolve(x, kernel, strides, dilation)
        # Measured: XLA's own gradient is faster for few channels.
        many = x.shape[-1] >= 32 or strides > 1
        if size == (3, 3) and algorithm == "products" and many:
            return _convolve_3x3(x, kernel, strides, dilation)
    return _xla_convolve(x, kernel, strides, dilation, groups)


def loop_algorithm(algorithm: str) -> str:
    """Resolves "auto" for convolutions inside a compiled loop.

    Outside loops, XLA:CPU calls a library of fast convolutions. Inside a loop,
    gradients run on slow generic code, except for matrix products.
    """
    in_slow_loop = algorithm == "auto" and platform() == "cpu"
    return "patches" if in_slow_loop else algorithm


def is_packable(x: jax.Array, kernel: jax.Array, strides: int) -> bool:
    """Whether ``packed_convolve`` takes a convolution and is worth it.

    These layers were the faster ones in timings on an H200; with 32 channels nothing
    was gained. benchmarks/notes.md has what it gains in whole nets.
    """
    _, height, width, channels = x.shape
    features = kernel.shape[-1]
    is_first = channels <= _IMAGE_CHANNELS and features <= 64
    is_narrow = channels == features == 16 and strides == 1
    return (
        x.dtype in (jnp.bfloat16, jnp.float16)
        and x.dtype == kernel.dtype
        and kernel.shape[:2] != (1, 1)
        and all(size % 2 for size in kernel.shape[:2])
        and (is_first or is_narrow)
        and _COLUMNS % strides == height % strides == width % _COLUMNS == 0
    )


def packed_convolve(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    """A convolution over blocks of pixels, whose pixels are channels.

    Tensor cores multiply large tiles, which 3 or 16 channels leave mostly empty. A
    block holds four columns, and as many rows as the stride. Its pixels are input
    channels, and the output pixels in it are output channels. The kernel over blocks
    holds zeros where a pixel and an output are too far apart, so an infinite pixel
    makes NaN of outputs that XLA's convolution keeps.

    x is (n, h, w, c), the kernel (height, width, c, features). The stride, 1, 2 or 4,
    divides h, and 4 divides w.
    """
    n, height, width, channels = x.shape
    features, dtype = kernel.shape[-1], x.dtype
    # Each value of the kernel occurs several times: add their gradients in float32.
    kernel = widen(kernel)
    if channels < _IMAGE_CHANNELS:
        missing = (0, _IMAGE_CHANNELS - channels)
        x = jnp.pad(x, (*[(0, 0)] * 3, missing))
        kernel = jnp.pad(kernel, (*[(0, 0)] * 2, missing, (0, 0)))
    channels, rows, columns = x.shape[3], height // strides, width // _COLUMNS
    # One axis at a time, as meshes with explicit axes need it.
    x = x.reshape(n, rows, strides, width, channels)
    x = x.reshape(n, rows, strides, columns, _COLUMNS, channels).swapaxes(2, 3)
    x = x.reshape(n, rows, columns, strides * _COLUMNS * channels)
    kernel, beside = _kernel_of_blocks(kernel, strides, _COLUMNS, axis=1)
    kernel, above = _kernel_of_blocks(kernel, strides, strides, axis=0)
    y = lax.conv_general_dilated(
        x, kernel.astype(dtype), (1, 1), (above, beside), dimension_numbers=_LAYOUT
    )
    y = y.reshape(n, rows, columns, _COLUMNS // strides, features)
    return y.reshape(n, rows, width // strides, features)


def _kernel_of_blocks(kernel, strides, length, axis):
    """The kernel over blocks of ``length`` pixels along an axis, and its padding.

    Output b of a block reads ``reach`` pixels on each side of pixel ``strides * b``.
    A block's pixels come in front of the channels, its outputs in front of the
    features.
    """
    size = kernel.shape[axis]
    reach, outputs = size // 2, length // strides
    before = -(-reach // length)
    after = (strides * (outputs - 1) + reach) // length
    blocks = before + 1 + after

    def placed(output):
        start = before * length + strides * output - reach
        around = [(0, 0)] * kernel.ndim
        around[axis] = start, blocks * length - start - size
        return jnp.pad(kernel, around)

    kernel = jnp.stack([placed(output) for output in range(outputs)], axis=-2)
    shape = [*kernel.shape]
    shape[axis : axis + 1] = blocks, length
    kernel = jnp.moveaxis(kernel.reshape(shape), axis + 1, -4)
    rows, columns, _, channels, _, features = kernel.shape
    kernel = kernel.reshape(rows, columns, length * channels, outputs * features)
    return kernel, (before, after)


def _xla_convolve(x, kernel, strides, dilation, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(strides, strides),
        padding=[(size // 2 * dilation,) * 2 for size in kernel.shape[:2]],
        rhs_dilation=(dilation, dilation),
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolve_3x3(x, kernel, strides, dilation):
    return _xla_convolve(x, kernel, strides, dilation)


@_convolve_3x3.defjvp
def _convolve_3x3_jvp(strides, dilation, primals, tangents):
    # The product form is linear in the kernel's tangent. Reverse mode runs only its
    # transpose: nine products.
    x, kernel = primals
    x_tangent, kernel_tangent = tangents
    y = _xla_convolve(x, kernel, strides, dilation)
    through_x = _xla_convolve(x_tangent, kernel, strides, dilation)
    through_kernel = _sum_of_taps(x, kernel_tangent, y.shape, strides, dilation)
    return y, through_x + through_kernel


# The patches are nine times the size of the map: recomputed for the gradient.
@functools.partial(jax.checkpoint, static_argnums=(2, 3), prevent_cse=False)
def _patches_convolve(x, kernel, strides, dilation):
    taps = list(_taps(x, kernel.shape[:2], strides, dilation))
    patches = jnp.concatenate([pixels for _, pixels in taps], axis=-1)
    return jnp.dot(patches, kernel.reshape(-1, kernel.shape[-1]))


def _sum_of_taps(x, kernel, shape, strides, dilation):
    """The convolution as a sum over taps: shifted pixels times the tap's matrix."""
    features = kernel.shape[-1]
    total = jnp.zeros((features, math.prod(shape[:3])), x.dtype)
    for (i, j), pixels in _taps(x, kernel.shape[:2], strides, dilation):
        # Features first: the transposed product is faster on the CPU.
        total += kernel[i, j].T @ pixels.reshape(-1, x.shape[-1]).T
    return total.T.reshape(shape)


def _taps(x, size, strides, dilation):
    """Yields each tap (i, j) and the pixels it reads, (n, h', w', c)."""
    reach = [side // 2 * dilation for side in size]
    padded = jnp.pad(x, ((0, 0), (reach[0],) * 2, (reach[1],) * 2, (0, 0)))
    rows, columns = ((side - 1) // strides * strides + 1 for side in x.shape[1:3])
    for i, j in itertools.product(range(size[0]), range(size[1])):
        top, left = i * dilation, j * dilation
        pixels = padded[:, top : top + rows : strides, left : left + columns : strides]
        yield (i, j), pixels
