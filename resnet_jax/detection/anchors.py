"""Anchors: the boxes at each cell of a map from which the RPN regresses proposals."""

from dataclasses import dataclass

import numpy as np

ORDERS = ("ratio", "size")


@dataclass(frozen=True)
class Anchors:
    """Boxes of several sizes and aspect ratios, centred on each cell's corner.

    The defaults are those of Faster R-CNN (Ren et al. 2015, section 3.1.1) and of the
    paper. Implementations differ in rounding and order, and weights depend on both:
    torchvision rounds and counts ratio by ratio, Detectron2 counts size by size.

    Attributes:
      sizes: square roots of the areas, in pixels.
      ratios: height over width.
      stride: pixels between cells.
      rounded: whether corners of the cell's anchors are rounded to whole pixels.
      order: what changes last within a cell, "ratio" or "size".
    """

    sizes: tuple[float, ...] = (128, 256, 512)
    ratios: tuple[float, ...] = (0.5, 1, 2)
    stride: int = 16
    rounded: bool = False
    order: str = "ratio"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, not {self.order!r}")

    @property
    def per_cell(self) -> int:
        """The number of anchors of a cell."""
        return len(self.sizes) * len(self.ratios)

    def cell(self) -> np.ndarray:
        """The anchors around (0, 0): float32 (A, 4)."""
        ratios = np.sqrt(np.array(self.ratios, np.float64))
        sizes = np.array(self.sizes, np.float64)
        widths, heights = np.outer(1 / ratios, sizes), np.outer(ratios, sizes)
        if self.order == "size":
            widths, heights = widths.T, heights.T
        half = np.stack([widths.ravel(), heights.ravel()], -1) / 2
        if self.rounded:
            half = np.round(half)
        return np.concatenate([-half, half], -1).astype(np.float32)

    def grid(self, h: int, w: int) -> np.ndarray:
        """The anchors of an h x w map: float32 (h * w * A, 4), row by row.

        Cell (i, j) lies at pixel (stride * j, stride * i); its A anchors follow each
        other. Anchors may cross the border of the image.
        """
        y, x = np.mgrid[:h, :w].reshape(2, -1) * np.float32(self.stride)
        corners = np.stack([x, y, x, y], -1)
        return (corners[:, None] + self.cell()).reshape(-1, 4).astype(np.float32)
