"""The strength of layer responses (Fig. 7 of He et al. 2015)."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from resnet_jax.analysis.convolutions import Path, is_convolution, leaf, unrolled
from resnet_jax.errors import UserError
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
      std: standard deviation of all its responses.
    """

    layer: str
    std: float


@flax.struct.dataclass
class ImageMoments:
    """Mean and squared deviations of each layer's response to each image.

    Attributes:
      layers: names of the layers in the net's order.
      sizes: the numbers that a layer responds to an image with: h w c of its map.
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
    nonlinearity": of the stem's and the blocks' 3x3 convolutions (1x1 ones, those of
    shortcuts among them, do not count), behind the normalisation that directly follows
    in the same block, and before the ReLU and the addition. Where none follows, in a
    net without normalisation and at the end of a pre-activation block, it is the
    convolution's own output; that of such a block is its whole residual function.

    The standard deviation is one for a layer: over all examples, pixels and channels
    together, from their common mean and with their number as divisor. The net runs as
    in evaluation: by the running statistics, without dropout.

    Args:
      model: a net, unrolled or scanned.
      variables: its params and batch_stats.
      batches: images (n, h, w, c), normalised as the net expects them, each example
        once; n may differ.

    Returns:
      The layers in the order in which the net computes them; the deviation is nan or
      infinite where responses were not finite.

    Raises:
      UserError: there is no batch, or no 3x3 convolution in the net.
    """
    moments_of = jax.jit(image_moments, static_argnums=0)
    statistics = ResponseStatistics()
    for images in batches:
        statistics.add(moments_of(model, variables, images))
    return statistics.responses()


def image_moments(model: nn.Module, variables: Any, images: jax.Array) -> ImageMoments:
    """What ``layer_responses`` adds up, of a batch; to be called inside jit.

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
            # Directly: the very array, with nothing between.
            if args and args[0] is response:
                keep(conv, y)
        return y

    with nn.intercept_methods(watch):
        _, updates = model.apply(
            variables, images, train=False, mutable=["intermediates"]
        )
    if not sizes:
        raise UserError(
            f"{type(model).__name__} has no 3x3 convolution whose response could be "
            "measured"
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
    # Pixels first, then channels: long sums in float32 lose their last terms.
    mean = x.mean((1, 2)).mean(-1)
    deviations = x - mean[:, None, None, None]
    return jnp.stack([mean, jnp.square(deviations).sum((1, 2)).sum(-1)])


class ResponseStatistics:
    """Adds up ``ImageMoments`` in float64 on the host."""

    def __init__(self):
        """Nothing is added yet."""
        self._layers: tuple[str, ...] = ()
        self._count = self._mean = self._squares = np.zeros(())

    def add(self, moments: ImageMoments, mask: Any = None) -> None:
        """Adds a batch; waits for the devices.

        Merged as by Chan, Golub & LeVeque 1983: with d = mean2 - mean1,

            mean = mean1 + d n2 / (n1 + n2),  S = S1 + S2 + d^2 n1 n2 / (n1 + n2)

        Args:
          moments: of the batch.
          mask: (n,), 1 for an example and 0 for padding; None: all are examples.
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
        # A net may overflow: its deviations are nan, and that is said by them alone.
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
        """Those of all that was added; UserError if nothing was."""
        if not self._layers:
            raise UserError("layer responses cannot be measured on no images")
        stds = np.sqrt(self._squares / self._count)
        return [
            Response(layer, float(std))
            for layer, std in zip(self._layers, stds, strict=True)
        ]
