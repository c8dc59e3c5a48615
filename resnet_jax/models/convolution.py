"""Convolutions, padded by hand, and how they are computed on each kind of device."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

ALGORITHMS = ("auto", "xla", "pointwise", "products", "patches")
STEM_ALGORITHMS = ("space_to_depth", "four_channels")

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He initialisation with the fan-out, as the authors' released code draws it."""

INITIALIZATIONS: dict[str, Any] = {
    "he": he_normal,
    "he_fan_in": nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
    "xavier": nn.initializers.xavier_uniform(),
    "normal_0.01": nn.initializers.normal(0.01),
}
"""He et al. 2015 (rectifiers) with either fan; Glorot & Bengio 2010; and a normal
distribution of one width for all layers, as before them (Krizhevsky et al. 2012).
"""


class Conv(nn.Module):
    """A convolution, by default without bias, padded the same on every side.

    'SAME' would pad a 3x3 of stride 2 on one side only, which shifts the maps by a
    pixel against torch's and the original's.

    Attributes:
      features: output channels.
      kernel_size: height and width, both odd.
      strides: of both axes.
      dilation: spacing of the taps, in pixels of the input.
      groups: parts of the channels that are convolved apart (ResNeXt).
      use_bias: whether a bias is added.
      kernel_init, bias_init: initialisers.
      dtype: of the computation; parameters are float32.
      algorithm: how it is computed, see ``convolve``; changes no result beyond
        rounding.
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
        kernel = self.param(
            "kernel",
            self.kernel_init,
            (*self.kernel_size, x.shape[-1] // self.groups, self.features),
            jnp.float32,
        )
        y = convolve(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            self.strides,
            self.dilation,
            self.groups,
            self.algorithm,
        )
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype)
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

    "xla" leaves it to XLA's convolution. "pointwise" writes a 1x1 convolution as a
    matrix product. "products" does so too, and writes the gradient of a 3x3's kernel as
    one product for each of its nine taps; the rest is XLA's. On the CPU, where XLA's
    gradients of kernels are slow, a training step of ResNet-50 takes about 0.7 of the
    time so (benchmarks/results); "auto" is "products" there and "xla" elsewhere.
    "patches" writes 3x3 convolutions too as one product, with the nine pixels of every
    output side by side: for loops on the CPU, see ``loop_algorithm``.

    Two more are for the few channels of images, on which matrix units lie idle.
    "space_to_depth" cuts the image into squares of 2x2 pixels, each a pixel of four
    times the channels, and a kernel of stride 2 into the same squares: the 7x7 on 3
    channels is a 4x4 of stride 1 on 12, whose further taps are zeros.
    "four_channels" gives image and kernel a fourth channel of zeros.

    Args:
      x: (n, h, w, c).
      kernel: (height, width, c / groups, features), height and width odd.
      strides: of both axes.
      dilation: spacing of the taps.
      groups: parts of the channels that are convolved apart.
      algorithm: one of ``ALGORITHMS`` or ``STEM_ALGORITHMS``.

    Returns:
      (n, ceil(h / strides), ceil(w / strides), features).

    Raises:
      ValueError: an unknown algorithm, or one that is not for this convolution.
    """
    known = (*ALGORITHMS, *STEM_ALGORITHMS)
    if algorithm not in known:
        raise ValueError(
            f"the convolution's algorithm is one of {', '.join(known)}, "
            f"not {algorithm!r}"
        )
    if algorithm == "space_to_depth":
        if (strides, dilation, groups) != (2, 1, 1):
            raise ValueError(
                "space_to_depth is for a convolution of stride 2 with neither dilation "
                f"nor groups, not of stride {strides}, dilation {dilation} and "
                f"{groups} groups"
            )
        return _space_to_depth_convolve(x, kernel)
    if algorithm == "four_channels":
        if groups > 1 or x.shape[-1] > 4:
            raise ValueError(
                "four_channels is for up to four channels in one group, not "
                f"{x.shape[-1]} in {groups}"
            )
        x, kernel = _four_channels(x, axis=3), _four_channels(kernel, axis=2)
        return _xla_convolve(x, kernel, strides, dilation)
    if algorithm == "auto":
        algorithm = "products" if jax.default_backend() == "cpu" else "xla"
    size = kernel.shape[:2]
    if algorithm == "xla" or groups > 1 or size not in ((1, 1), (3, 3)):
        return _xla_convolve(x, kernel, strides, dilation, groups)
    if size == (1, 1):
        return jnp.dot(x[:, ::strides, ::strides, :], kernel[0, 0])
    if algorithm == "pointwise":
        return _xla_convolve(x, kernel, strides, dilation)
    if algorithm == "patches":
        return _patches_convolve(x, kernel, strides, dilation)
    # Measured: for few channels XLA's own gradient is the faster one.
    if x.shape[-1] >= 32 or strides > 1:
        return _convolve_3x3(x, kernel, strides, dilation)
    return _xla_convolve(x, kernel, strides, dilation)


def _space_to_depth_convolve(x, kernel):
    """A convolution of stride 2 as one of stride 1 on squares of 2x2 pixels.

    Output i meets the pixels 2 i - reach to 2 i + reach. One more tap, of zeros, makes
    these whole squares: in front where the reach is odd, else behind.
    """
    reaches = [size // 2 for size in kernel.shape[:2]]
    tap = [(reach % 2, 1 - reach % 2) for reach in reaches]
    odd = [(0, side % 2) for side in x.shape[1:3]]
    return lax.conv_general_dilated(
        _squares(jnp.pad(x, ((0, 0), *odd, (0, 0))), 1),
        _squares(jnp.pad(kernel, (*tap, (0, 0), (0, 0))), 0),
        window_strides=(1, 1),
        padding=[(-(-reach // 2), reach // 2) for reach in reaches],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _squares(array, axis):
    """The axes (h, w, c) from ``axis`` on as (h / 2, w / 2, 4 c)."""
    before, after = array.shape[:axis], array.shape[axis + 3 :]
    height, width, channels = array.shape[axis : axis + 3]
    cut = array.reshape(*before, height // 2, 2, width // 2, 2, channels, *after)
    ordered = jnp.swapaxes(cut, axis + 1, axis + 2)
    return ordered.reshape(*before, height // 2, width // 2, 4 * channels, *after)


def _four_channels(array, axis):
    """``array`` with zeros up to four channels."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, 4 - array.shape[axis])
    return jnp.pad(array, padding)


def loop_algorithm(algorithm: str) -> str:
    """What "auto" means for convolutions inside a compiled loop.

    Outside of loops XLA:CPU calls its library of fast convolutions; gradients inside
    one run on slow code of its own, but for matrix products.
    """
    in_slow_loop = algorithm == "auto" and jax.default_backend() == "cpu"
    return "patches" if in_slow_loop else algorithm


def _xla_convolve(x, kernel, strides, dilation, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(strides, strides),
        padding=[(size // 2 * dilation,) * 2 for size in kernel.shape[:2]],
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolve_3x3(x, kernel, strides, dilation):
    return _xla_convolve(x, kernel, strides, dilation)


@_convolve_3x3.defjvp
def _convolve_3x3_jvp(strides, dilation, primals, tangents):
    # The product form is linear in the kernel's tangent. Reverse mode transposes it
    # and never computes it: what runs is its transpose, nine products.
    x, kernel = primals
    x_tangent, kernel_tangent = tangents
    y = _xla_convolve(x, kernel, strides, dilation)
    through_x = _xla_convolve(x_tangent, kernel, strides, dilation)
    through_kernel = _sum_of_taps(x, kernel_tangent, y.shape, strides, dilation)
    return y, through_x + through_kernel


# The patches are nine times the map: made again for the gradient, not kept.
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
        # Features first: the transposed product is the faster one on the CPU.
        total += kernel[i, j].T @ pixels.reshape(-1, x.shape[-1]).T
    return total.T.reshape(shape)


def _taps(x, size, strides, dilation):
    """Each tap (i, j) with the pixels that it meets, (n, h', w', c)."""
    reach = [side // 2 * dilation for side in size]
    padded = jnp.pad(x, ((0, 0), (reach[0],) * 2, (reach[1],) * 2, (0, 0)))
    rows, columns = ((side - 1) // strides * strides + 1 for side in x.shape[1:3])
    for i in range(size[0]):
        for j in range(size[1]):
            top, left = i * dilation, j * dilation
            yield (
                (i, j),
                padded[:, top : top + rows : strides, left : left + columns : strides],
            )
