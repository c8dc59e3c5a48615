"""The maps that a net gives to detectors, segmenters and other heads."""

import flax.struct
import jax


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
