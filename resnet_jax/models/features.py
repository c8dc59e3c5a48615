"""What the convolutional nets share: logits, and the maps of their stages."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from resnet_jax.errors import UserError


@flax.struct.dataclass
class FeatureMap:
    """One map of a net; a pytree whose name and stride are static.

    Attributes:
      array: (n, ceil(h / stride), ceil(w / stride), c).
      name: "C1" to "C5", the notation of the detection literature.
      stride: pixels of the image between neighbours on the map.
    """

    array: jax.Array
    name: str = flax.struct.field(pytree_node=False)
    stride: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.array.shape


class FeatureNet(nn.Module):
    """A net of stages; a subclass defines ``_maps_and_output(images, train)``."""

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Class logits.

        Args:
          images: (n, h, w, channels), floating point.
          train: use dropout and stochastic depth (pass ``rngs={"dropout": key}`` to
            ``apply`` if the net has them), normalise by the batch's statistics and
            update the running ones (pass ``mutable=["batch_stats"]``).

        Returns:
          (n, num_classes) float32 logits, or (n, channels) float32 pooled features if
          ``num_classes`` is None.

        Raises:
          UserError: one image without a batch, or channels before height and width.
        """
        return self._maps_and_output(checked_images(images), train)[1]

    def features(
        self, images: jax.Array, train: bool = False
    ) -> tuple[FeatureMap, ...]:
        """The net's maps C1, C2, ...; its docstring lists them."""
        return self._maps_and_output(checked_images(images), train)[0]

    def _maps_and_output(self, images, train):
        raise NotImplementedError


def checked_images(images: jax.Array) -> jax.Array:
    """The images, if their shape can be (n, h, w, channels).

    Raises:
      UserError: it cannot; the sentence says how to change it.
    """
    shape = jnp.shape(images)
    if len(shape) != 4:
        hint = "; for one image, images[None]" if len(shape) == 3 else ""
        raise UserError(
            f"images have the shape (n, height, width, channels), not {shape}{hint}"
        )
    # A square of 5 or more pixels behind one or three channels.
    if shape[1] in (1, 3) and shape[2] == shape[3] > 4:
        raise UserError(
            f"images of shape {shape} have their channels before height and width: "
            "transpose them, images.transpose(0, 2, 3, 1)"
        )
    return images


def check_stages(
    images: jax.Array, poolings: int, widths: Sequence[int], **sizes: Sequence[int]
) -> None:
    """Checks that each stage has a size, and that the images outlast the poolings.

    Raises:
      ValueError: they do not.
    """
    for name, values in sizes.items():
        if len(widths) != len(values):
            raise ValueError(
                f"{len(widths)} widths but {len(values)} {name}: give one of each for "
                "every stage"
            )
    height, width = images.shape[1:3]
    smallest = 2**poolings
    if min(height, width) < smallest:
        raise ValueError(
            f"images of {height}x{width} pixels are too small: {poolings} poolings "
            f"need at least {smallest}x{smallest}"
        )
