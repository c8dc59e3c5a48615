"""What is known of an image: its size and its objects."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Annotation:
    """The objects of one image. Boxes are x1, y1, x2, y2 in its pixels, from 0.

    Attributes:
      size: height and width of the image.
      boxes: float32 (n, 4).
      classes: int32 (n,), from 0.
      difficult: bool (n,), as VOC marks them.
      crowd: bool (n,), COCO's iscrowd.
      areas: float32 (n,): COCO's area of the segmentation, else of the box.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
