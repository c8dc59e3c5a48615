"""Random crops of training images, and the boxes that they show."""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from resnet_jax.data import crops
from resnet_jax.data.order import Order
from resnet_jax.detection.localization.error import areas

_VISIBLE = 0.5  # A crop keeps the boxes with this share of their area in it.


@dataclasses.dataclass(frozen=True)
class Crops:
    """Random crops of training images with the boxes that they show."""

    images: Sequence[np.ndarray]
    boxes: Sequence[np.ndarray]
    classes: np.ndarray
    size: int
    shorter_sides: tuple[int, int]
    order: Order

    @functools.cached_property
    def most(self) -> int:
        """The most boxes of an image."""
        return max(len(each) for each in self.boxes)

    def batches(
        self, steps: int, batch_size: int, num_threads: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """The batches of ``make_train_step``; the next one is read ahead."""
        with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            ahead: collections.deque[list[Any]] = collections.deque()
            for step in range(steps + 1):
                if step < steps:
                    places = range(step * batch_size, (step + 1) * batch_size)
                    ahead.append([pool.submit(self.crop, place) for place in places])
                if step:
                    examples = [future.result() for future in ahead.popleft()]
                    yield {
                        key: np.stack([e[key] for e in examples]) for key in examples[0]
                    }

    def crop(self, place: int) -> dict[str, np.ndarray]:
        """The crop of a global example index."""
        [index], rng = self.order.examples(place, 1), self.order.generator(place)
        image, size = self.images[index], self.size
        height, width, channels = image.shape
        window = crops.scale_window(height, width, size, self.shorter_sides, rng)
        pixels = np.empty((size, size, channels), np.uint8)
        crops.resize(window.of(image), pixels)
        corner = np.array([window.left, window.top] * 2)
        extent = np.array([window.width, window.height] * 2)
        boxes = (self.boxes[index] - corner) * size / extent
        if rng.random() < 0.5:
            crops.mirror(pixels)
            boxes = boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [size, 0, size, 0]
        shown = boxes.clip(0, size)
        padded, present = (
            np.zeros((self.most, 4), np.float32),
            np.zeros(self.most, bool),
        )
        padded[: len(shown)] = shown
        present[: len(shown)] = areas(shown) >= _VISIBLE * areas(boxes)
        classes = np.array(self.classes[index], np.int32)
        return {
            "images": pixels,
            "boxes": padded,
            "present": present,
            "classes": classes,
        }
