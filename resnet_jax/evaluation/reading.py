"""Reads images for a test: decodes each once and cuts the views of every protocol."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from resnet_jax.data import images
from resnet_jax.data.sources import Source
from resnet_jax.data.views import refuse_narrow
from resnet_jax.errors import UserError
from resnet_jax.evaluation.protocols import Protocol

Look = tuple[Protocol, int]
"""A protocol, and the channels of the images that its nets take."""


@dataclasses.dataclass(frozen=True)
class ViewReader:
    """Views by position; worker threads and processes call it.

    Attributes:
      source: the images.
      looks: the views to cut.
      indices: of the examples, in the order of the positions.
      max_pixels: data.max_image_pixels.
      skip: whether a broken image gives {"fault": sentence} instead of {"error":
        sentence}, which ends the reading.
    """

    source: Source
    looks: tuple[Look, ...]
    indices: Sequence[int]
    max_pixels: int
    skip: bool = False

    def __call__(self, position: int) -> dict[str, Any]:
        """``index``, ``name``, ``label`` and ``views``, a list for each look.

        A view is uint8 (h, w, c).
        """
        index = int(self.indices[position])
        try:
            example = self.source[index]
            found = {"index": index, "name": example.name, "label": example.label}
            views = [self._views(example, *look) for look in self.looks]
        except UserError as error:
            return {"fault" if self.skip else "error": str(error), "index": index}
        return found | {"views": views}

    def _views(
        self, example: Any, protocol: Protocol, channels: int
    ) -> list[np.ndarray]:
        image = images.decode(example, channels, self.max_pixels)
        if image.shape[-1] != channels:
            raise UserError(
                f"image {example.name} has {image.shape[-1]} channels and the net "
                f"takes {channels}; give other data, or a net for them"
            )
        for side in protocol.shorter_sides_used:
            refuse_narrow(image, side, example.name, self.max_pixels)
        return protocol.views(image)
