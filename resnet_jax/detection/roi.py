"""Maps of one size from regions of any size: RoIAlign and RoI pooling.

Both take one image's map in a padded batch, and return what the map without its padding
gives.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.models.pooling import inside


def roi_align(
    features: jax.Array,
    rois: jax.Array,
    size: jax.Array,
    stride: int = 16,
    out: int = 14,
    sampling: int = 2,
    aligned: bool = True,
) -> jax.Array:
    """Regions as averages of interpolated samples (He et al. 2017, Mask R-CNN).

    Each of out x out bins is the mean of sampling x sampling bilinear samples. Samples
    and edges are those of the compiled kernels of torchvision and Detectron2: a sample
    within a pixel of the map takes the value at its edge, one further away counts as 0.

    Samples form a grid, so a region is two products: its rows' weights times the map
    times its columns' weights. The longer side of the map is contracted first, which
    leaves the smaller array (R, out, shorter side, c) between the products.

    Args:
      features: (h, w, c), padded below and to the right.
      rois: float32 (R, 4), boxes in image pixels. They get no useful gradient; stop it.
      size: integers (2,), height and width of the map without its padding, which has no
        effect up to the rounding of sums.
      stride: image pixels between cells of the map.
      out: the side of the result.
      sampling: samples per bin along each axis.
      aligned: whether cells are centred on half-integers (Detectron2). If not, a region
        lies half a cell lower and to the right, and has at least one cell
        (torchvision's detectors).

    Returns:
      (R, out, out, c) in the dtype of ``features``. Float32 products are exact; of
      bfloat16 maps, weights are rounded and sums are float32.
    """
    # Undefined numbers in the padding must not meet a weight of zero.
    features = jnp.where(inside(features[None], size[None])[0], features, 0)
    weights = functools.partial(
        _weights, rois / stride, out=out, sampling=sampling, aligned=aligned
    )
    x = weights(0, length=features.shape[1], valid=size[1]).astype(features.dtype)
    y = weights(1, length=features.shape[0], valid=size[0]).astype(features.dtype)
    contract = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    if features.shape[1] >= features.shape[0]:
        columns = contract("rjw,hwc->rjhc", x, features)
        return contract("rih,rjhc->rijc", y, columns)
    rows = contract("rih,hwc->riwc", y, features)
    return contract("rjw,riwc->rijc", x, rows)


def _weights(rois, axis, *, length, valid, out, sampling, aligned):
    """The weights (R, out, length) of the map's cells in each bin along an axis.

    Args:
      rois: (R, 4) in cells.
      axis: 0 for x, 1 for y.
      length: the cells of the padded map.
      valid: the cells of the map without padding.
      out: bins.
      sampling: samples per bin.
      aligned: see ``roi_align``.
    """
    start, end = rois[:, axis], rois[:, axis + 2]
    extent = end - start
    if aligned:
        start = start - 0.5
    else:
        extent = jnp.maximum(extent, 1)
    steps = (jnp.arange(out * sampling) + 0.5) / sampling
    samples = start[:, None] + steps * (extent[:, None] / out)
    near = (samples >= -1) & (samples <= valid)
    samples = jnp.clip(samples, 0, valid - 1)
    distance = jnp.abs(samples[..., None] - jnp.arange(length))
    bilinear = jnp.maximum(1 - distance, 0) * near[..., None]
    return bilinear.reshape(-1, out, sampling, length).mean(2)


def roi_pool(
    features: jax.Array, rois: jax.Array, size: jax.Array, stride: int, out: int
) -> jax.Array:
    """The largest value of each bin of whole cells (Girshick 2015, section 2.1).

    As in Caffe, corners are rounded to cells, a region has at least one, bins share
    cells where they do not divide, and a bin outside the map is 0.

    Args:
      features: (h, w, c), padded below and to the right.
      rois: float32 (R, 4), boxes in image pixels.
      size: integers (2,), height and width of the map without its padding, which has no
        effect.
      stride: image pixels between cells of the map.
      out: the side of the result.

    Returns:
      (R, out, out, c) in the dtype of ``features``. Of equal largest values, each gets
      its share of the gradient.
    """
    bins = functools.partial(_bins, rois / stride, out=out)
    x = bins(0, length=features.shape[1], valid=size[1])
    y = bins(1, length=features.shape[0], valid=size[0])

    # Region by region, also backward: all regions' masked maps would not fit.
    @jax.checkpoint
    def pool(masks):
        columns, rows = masks
        lowest = jnp.array(-jnp.inf, features.dtype)
        by_row = jnp.where(rows[:, :, None, None], features, lowest).max(1)
        by_bin = jnp.where(columns[:, :, None], by_row[:, None], lowest).max(2)
        return jnp.where(by_bin > lowest, by_bin, 0)

    return lax.map(pool, (x, y))


def _bins(rois, axis, *, length, valid, out):
    """Which cells (R, out, length) of the map belong to each bin along an axis.

    Borders are exact fractions; Caffe's are float32, which at some lengths (57 cells in
    7 bins) adds a cell to a bin.
    """
    corners = rois[:, axis::2]  # halves are rounded away from zero, as in C
    corners = jnp.sign(corners) * jnp.floor(jnp.abs(corners) + 0.5)
    start, end = corners.astype(jnp.int32).T[..., None]
    extent = jnp.maximum(end - start + 1, 1)
    bins = jnp.arange(out)
    first = start + bins * extent // out
    last = start - (-(bins + 1) * extent // out)
    cells = jnp.arange(length)
    inner = (cells >= first[..., None]) & (cells < last[..., None])
    return inner & (cells < valid)
