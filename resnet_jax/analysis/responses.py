"""The strength of layer responses (Fig. 7 of He et al. 2015)."""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from resnet_jax import parallel
from resnet_jax.analysis.convolutions import (
    Path,
    PerLayer,
    is_convolution,
    leaf,
    unrolled,
)
from resnet_jax.data.transforms import normalize, to_unit
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluator import evaluation_batch_size, jit_over_batch
from resnet_jax.evaluation.saved_run import load_run
from resnet_jax.models.norm import BatchNorm

_NORMALIZATIONS = (
    BatchNorm,
    nn.BatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


class Response(NamedTuple):
    """How strongly a 3x3 layer responds.

    Attributes:
      layer: its convolution in the unrolled net: "stem/conv", "stage1/block1/conv2".
      std: standard deviation of its responses.
    """

    layer: str
    std: float


def layer_responses(
    model: nn.Module, variables: Any, batches: Iterable[jax.Array]
) -> list[Response]:
    """The standard deviation of each 3x3 layer's response, as in Fig. 7.

    The response is "the output of each 3x3 layer, after BN and before other
    nonlinearity": the output of a 3x3 convolution of the stem or a block (1x1
    convolutions do not count) after the normalisation that directly follows it, and
    before ReLU and addition. If no normalisation follows (in a net without, or at the
    end of a pre-activation block), it is the convolution's own output.

    Each layer has one standard deviation, over all examples, pixels and channels from
    their common mean, divided by n. The net runs as in evaluation: with the running
    statistics, without dropout.

    Args:
      model: a net, unrolled or scanned.
      variables: its params and batch_stats.
      batches: images (n, h, w, c), normalised as the net expects them, each example
        once; n may differ.

    Returns:
      The layers in the order in which the net computes them. The deviation is NaN or
      infinite if responses were not finite.

    Raises:
      UserError: there is no batch, or no 3x3 convolution in the net.
    """
    moments_of = jax.jit(_image_moments, static_argnums=0)
    return _pooled((moments_of(model, variables, images), None) for images in batches)


def responses_of_run(
    workdir: str | os.PathLike[str],
    *,
    split: str = "test",
    checkpoint: int | str = "last",
) -> list[Response]:
    """``layer_responses`` of a run's net, over a whole split as evaluation sees it.

    The paper does not say over which examples its own figure is.

    Args:
      workdir: of ``train``.
      split: "test", "holdout" or "train" (centre crops).
      checkpoint: "last", "best" (lowest held-out error) or a step.

    Raises:
      UserError: there is no such run, checkpoint or split, or the net has no 3x3
        convolution.
    """
    run = load_run(workdir, checkpoint)
    feed = run.feed(run.split(split))

    def moments_of(variables, statistics, images, labels, batch):
        images = normalize(to_unit(images), statistics)
        return _image_moments(run.model, variables, images), batch["mask"]

    step = jit_over_batch(moments_of, run.mesh)
    size = evaluation_batch_size(run.config, run.mesh)
    return _pooled(
        parallel.settled(step(run.variables, run.statistics, feed.resident, batch))
        for batch in feed.evaluation_batches(size)
    )


def _image_moments(model: nn.Module, variables: Any, images: jax.Array) -> PerLayer:
    """``_moments`` of each layer's response to a batch, (layers, 3, n); inside jit."""
    paths: dict[Path, None] = {}
    latest: dict[Path, tuple[nn.Module, jax.Array]] = {}

    def keep(conv, response):
        paths[conv.path] = None
        conv.put_variable("intermediates", "response", _moments(response))

    def watch(method, args, kwargs, context):
        y, module = method(*args, **kwargs), context.module
        if is_convolution(context) and tuple(module.kernel_size) == (3, 3):
            latest[module.path[:-1]] = module, y
            keep(module, y)
        elif isinstance(module, _NORMALIZATIONS) and module.path[:-1] in latest:
            conv, response = latest[module.path[:-1]]
            # It follows directly if its input is the very same array.
            if args and args[0] is response:
                keep(conv, y)
        return y

    with nn.intercept_methods(watch):
        _, updates = model.apply(
            variables, images, train=False, mutable=["intermediates"]
        )
    if not paths:
        raise UserError(
            f"{type(model).__name__} has no 3x3 convolution, so there are no "
            "responses to measure"
        )
    found = updates["intermediates"]
    return unrolled({path: leaf(found, (*path, "response")) for path in paths})


def _moments(response: jax.Array) -> jax.Array:
    """(3, n): mean, squared deviations from it and h w c, for each of (n, h, w, c)."""
    x = response.astype(jnp.promote_types(response.dtype, jnp.float32))
    # Pixels first, then channels: a long float32 sum loses small terms.
    mean = x.mean((1, 2)).mean(-1)
    deviations = x - mean[:, None, None, None]
    squares = jnp.square(deviations).sum((1, 2)).sum(-1)
    return jnp.stack([mean, squares, jnp.full_like(mean, x[0].size)])


def _pooled(batches: Iterable[tuple[PerLayer, Any]]) -> list[Response]:
    """The responses over all batches, added up in float64 on the host.

    Args:
      batches: moments and a mask (n,), 1 for an example and 0 for padding; None if all
        are examples.
    """
    layers: tuple[str, ...] = ()
    total = np.zeros(())
    for moments, mask in batches:
        values = np.asarray(moments.values, np.float64)
        if mask is not None:
            values = values[:, :, np.asarray(mask) > 0]
        if values.shape[2]:
            values = np.concatenate([total, values], 2) if layers else values
            layers, total = moments.layers, _pool(values)
    if not layers:
        raise UserError("layer responses cannot be measured on no images")
    _, squares, count = total[:, :, 0].T
    return list(map(Response, layers, np.sqrt(squares / count).tolist()))


def _pool(moments: np.ndarray) -> np.ndarray:
    """Merges the moments of n groups: (layers, 3, n) to (layers, 3, 1)."""
    means, squares, counts = moments.transpose(1, 0, 2)
    # A net that overflows has NaN deviations, which say enough.
    with np.errstate(invalid="ignore", over="ignore"):
        count = counts.sum(1, keepdims=True)
        mean = (counts * means).sum(1, keepdims=True) / count
        squares = squares + counts * np.square(means - mean)
        return np.stack([mean, squares.sum(1, keepdims=True), count], 1)
