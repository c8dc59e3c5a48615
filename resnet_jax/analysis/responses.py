"""The strength of layer responses (Fig. 7 of He et al. 2015)."""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from resnet_jax import parallel
from resnet_jax.analysis.convolutions import Path, is_convolution, leaf, unrolled
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


@flax.struct.dataclass
class ImageMoments:
    """Mean and squared deviations of each layer's response to each image.

    Attributes:
      layers: names of the layers in the net's order.
      sizes: numbers in a layer's response to one image: h w c of its map.
      mean: (layers, n), float32 or wider.
      squares: (layers, n), sums of squared deviations from that mean.
    """

    layers: tuple[str, ...] = flax.struct.field(pytree_node=False)
    sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)
    mean: jax.Array
    squares: jax.Array


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
    moments_of = jax.jit(image_moments, static_argnums=0)
    statistics = ResponseStatistics()
    for images in batches:
        statistics.add(moments_of(model, variables, images))
    return statistics.responses()


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
        return image_moments(run.model, variables, images), batch["mask"]

    step, statistics = jit_over_batch(moments_of, run.mesh), ResponseStatistics()
    size = evaluation_batch_size(run.config, run.mesh)
    for batch in feed.evaluation_batches(size):
        found = step(run.variables, run.statistics, feed.resident, batch)
        statistics.add(*parallel.settled(found))
    return statistics.responses()


def image_moments(model: nn.Module, variables: Any, images: jax.Array) -> ImageMoments:
    """The moments that ``layer_responses`` adds up, for one batch; inside jit.

    Args:
      model: a net, unrolled or scanned.
      variables: its params and batch_stats.
      images: (n, h, w, c), normalised as the net expects them.

    Raises:
      UserError: the net has no 3x3 convolution.
    """
    sizes: dict[Path, int] = {}
    latest: dict[Path, tuple[nn.Module, jax.Array]] = {}

    def keep(conv, response):
        sizes[conv.path] = response[0].size
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
    if not sizes:
        raise UserError(
            f"{type(model).__name__} has no 3x3 convolution, so there are no "
            "responses to measure"
        )
    found = updates["intermediates"]
    moments = unrolled({path: leaf(found, (*path, "response")) for path in sizes})
    lengths = unrolled(
        {
            path: np.full(leaf(found, (*path, "response")).shape[:-2], size)
            for path, size in sizes.items()
        }
    )
    stacked = jnp.stack(list(moments.values()))
    return ImageMoments(
        layers=tuple(moments),
        sizes=tuple(map(int, lengths.values())),
        mean=stacked[:, 0],
        squares=stacked[:, 1],
    )


def _moments(response: jax.Array) -> jax.Array:
    """(2, n): mean and sum of squared deviations of (n, h, w, c), image by image."""
    x = response.astype(jnp.promote_types(response.dtype, jnp.float32))
    # Pixels first, then channels: a long float32 sum loses small terms.
    mean = x.mean((1, 2)).mean(-1)
    deviations = x - mean[:, None, None, None]
    return jnp.stack([mean, jnp.square(deviations).sum((1, 2)).sum(-1)])


class ResponseStatistics:
    """Adds up ``ImageMoments`` in float64 on the host."""

    def __init__(self):
        """Starts empty."""
        self._layers: tuple[str, ...] = ()
        self._count = self._mean = self._squares = np.zeros(())

    def add(self, moments: ImageMoments, mask: Any = None) -> None:
        """Adds a batch; waits for the devices.

        Merged as by Chan, Golub & LeVeque 1983: with d = mean2 - mean1,

            mean = mean1 + d n2 / (n1 + n2),  S = S1 + S2 + d^2 n1 n2 / (n1 + n2)

        Args:
          moments: of the batch.
          mask: (n,), 1 for an example and 0 for padding; None if all are examples.
        """
        mean, squares = (
            np.asarray(part, np.float64) for part in (moments.mean, moments.squares)
        )
        if mask is not None:
            real = np.asarray(mask) > 0
            mean, squares = mean[:, real], squares[:, real]
        if not mean.shape[1]:
            return
        sizes = np.asarray(moments.sizes, np.float64)
        # A net that overflows has NaN deviations, which say enough.
        with np.errstate(invalid="ignore", over="ignore"):
            center = mean.mean(1)
            between = np.square(mean - center[:, None]).sum(1)
            count = sizes * mean.shape[1]
            self._merge(count, center, squares.sum(1) + sizes * between)
        self._layers = moments.layers

    def _merge(self, count, mean, squares):
        total, delta = self._count + count, mean - self._mean
        self._squares = (
            self._squares + squares + np.square(delta) * (self._count * count / total)
        )
        self._mean = self._mean + delta * (count / total)
        self._count = total

    def responses(self) -> list[Response]:
        """The responses over everything added; UserError if nothing was."""
        if not self._layers:
            raise UserError("layer responses cannot be measured on no images")
        stds = np.sqrt(self._squares / self._count)
        return [
            Response(layer, float(std))
            for layer, std in zip(self._layers, stds, strict=True)
        ]
