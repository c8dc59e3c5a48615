"""Batches of annotated images of one shape, for training and evaluation.

An image is resized until its shorter side has ``shorter_side`` pixels or its longer one
``longer_side``, and padded with zeros to one of two shapes, the buckets: landscape,
which squares belong to, or portrait. All images of a batch share a bucket. A batch is

    images  uint8 (B, H, W, 3)
    sizes   int32 (B, 2), height and width of the resized image
    scales  float32 (B, 2), resized over original height and width
    boxes   float32 (B, G, 4), in pixels of the resized image and inside it
    classes int32 (B, G), -1 for an absent box
    index   int32 (B,), in training the number of the draw, counted from the first one
            of the run; in evaluation the image, or -1 for a filler

G is the largest number of boxes of an image. Crowds are not among the boxes, nor,
with ``difficult="skip"``, difficult objects.
"""

import dataclasses
import functools
from collections.abc import Generator

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from resnet_jax.config.detection import DetectionDataConfig
from resnet_jax.config.schema import DataConfig
from resnet_jax.data import images
from resnet_jax.data.batch import Batch
from resnet_jax.data.chunks import Chunk, Layout
from resnet_jax.data.feeds import batch_layout, host_batches, placed
from resnet_jax.data.order import Order, epoch_order
from resnet_jax.detection.annotations import Annotation, Source, decode
from resnet_jax.errors import UserError

STRIDE = 16
"""Heights and widths of batches are multiples of it."""
_REPLACEMENTS = 100  # attempts to replace a broken image before the run stops


def bucket_shapes(data: DetectionDataConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the batches: landscape, portrait."""
    shorter, longer = (
        -(-side // STRIDE) * STRIDE for side in (data.shorter_side, data.longer_side)
    )
    return (shorter, longer), (longer, shorter)


def resized_size(
    size: tuple[int, int], shorter_side: int, longer_side: int
) -> tuple[int, int]:
    """Height and width of a resized image.

    The shorter side becomes ``shorter_side``, unless the longer one then exceeded
    ``longer_side``, which it becomes instead (Ren et al. 2015). Sides are rounded to
    whole pixels, and at least 1.
    """
    scale = min(shorter_side / min(size), longer_side / max(size))
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def at_scale(data: DetectionDataConfig, shorter_side: int) -> DetectionDataConfig:
    """The same images at another scale; the limit of the longer side goes with it."""
    longer_side = round(data.longer_side * shorter_side / data.shorter_side)
    return dataclasses.replace(data, shorter_side=shorter_side, longer_side=longer_side)


def trained_boxes(
    annotation: Annotation, difficult: str
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes float32 (n, 4) and classes int32 (n,) that training uses.

    Args:
      annotation: of an image.
      difficult: "use" or "skip" difficult objects.
    """
    kept = ~annotation.crowd
    if difficult == "skip":
        kept &= ~annotation.difficult
    return annotation.boxes[kept], annotation.classes[kept]


@dataclasses.dataclass(frozen=True, eq=False)
class BucketOrder:
    """The images of each training batch, as a stateless function of seed and step.

    An epoch shuffles all images. They fill a batch of their bucket as they come; at the
    end, the unfinished batch of each bucket is filled with the first images of the
    epoch's bucket. So each epoch has every image, and the same number of batches.

    Attributes:
      buckets: int (n,), the bucket of each image.
      batch_size: of the global batch.
      seed: of the shuffles.
    """

    buckets: np.ndarray
    batch_size: int
    seed: int

    @functools.cached_property
    def epoch_steps(self) -> int:
        """Batches per epoch."""
        return int((-(-np.bincount(self.buckets) // self.batch_size)).sum())

    def batch(self, step: int) -> np.ndarray:
        """The images of the batch of a step, int (batch_size,)."""
        epoch, place = divmod(step, self.epoch_steps)
        return _epoch_batches(self, epoch)[place]

    def generator(self, draw: int, attempt: int = 0) -> np.random.Generator:
        """The random numbers of a draw, a function of it and the seed."""
        return Order(len(self.buckets), self.seed).generator(draw, attempt)


@functools.lru_cache(maxsize=4)
def _epoch_batches(order: BucketOrder, epoch: int) -> np.ndarray:
    """The images of all batches of an epoch, int (epoch_steps, batch_size)."""
    shuffled = epoch_order(len(order.buckets), order.seed, epoch)
    batches, filled_at = [], []
    for bucket in np.unique(order.buckets):
        places = np.flatnonzero(order.buckets[shuffled] == bucket)
        count = -(-len(places) // order.batch_size)
        # np.resize starts again at the first.
        padded = np.resize(shuffled[places], count * order.batch_size)
        batches.append(padded.reshape(count, order.batch_size))
        last = places[order.batch_size - 1 :: order.batch_size]
        unfinished = len(shuffled) + int(bucket)
        filled_at.append(np.append(last, unfinished)[:count])
    return np.concatenate(batches)[np.argsort(np.concatenate(filled_at))]


class PreparedImages:
    """The images of a source, resized and padded to their buckets.

    Attributes:
      source: the annotated images.
      shapes: heights and widths of the buckets.
      buckets: int8 (n,), the bucket of each image.
      most_boxes: the largest number of boxes of an image, at least 1; G.
    """

    def __init__(self, source: Source, data: DetectionDataConfig):
        """Reads all annotations, but no image."""
        self.source, self._data = source, data
        self.shapes = bucket_shapes(data)
        self.buckets = np.zeros(len(source), np.int8)
        self.most_boxes = 1
        for index in range(len(source)):
            annotation = source.annotation(index)
            self.buckets[index] = annotation.size[0] > annotation.size[1]
            count = len(trained_boxes(annotation, data.difficult)[0])
            self.most_boxes = max(self.most_boxes, count)

    def __len__(self) -> int:
        return len(self.buckets)

    def empty(self, bucket: int, count: int) -> Chunk:
        """Room for ``count`` examples of a bucket; all are fillers."""
        return {
            "images": np.zeros((count, *self.shapes[bucket], 3), np.uint8),
            "sizes": np.tile(np.array(self.shapes[bucket], np.int32), (count, 1)),
            "scales": np.ones((count, 2), np.float32),
            "boxes": np.zeros((count, self.most_boxes, 4), np.float32),
            "classes": np.full((count, self.most_boxes), -1, np.int32),
            "index": np.full(count, -1, np.int32),
        }

    def write(self, index: int, chunk: Chunk, row: int, flip: bool) -> None:
        """Writes an image and its boxes into a row of an ``empty`` chunk.

        Raises:
          UserError: the image is broken.
        """
        data = self._data
        pixels = decode(self.source, index, data.max_image_pixels)
        annotation = self.source.annotation(index)
        size = resized_size(annotation.size, data.shorter_side, data.longer_side)
        scale = np.array(size, np.float32) / np.array(annotation.size, np.float32)
        boxes, classes = trained_boxes(annotation, data.difficult)
        limits = np.tile(np.array(size[::-1], np.float32), 2)
        boxes = np.clip(boxes * np.tile(scale[::-1], 2), 0, limits)
        pixels = _resized(pixels, size, data.interpolation)
        if flip:
            pixels = pixels[:, ::-1]
            boxes[:, [0, 2]] = size[1] - boxes[:, [2, 0]]
        chunk["boxes"][row], chunk["classes"][row] = pad_boxes(
            boxes, classes, self.most_boxes
        )
        chunk["images"][row, : size[0], : size[1]] = pixels
        chunk["sizes"][row], chunk["scales"][row] = size, scale


def pad_boxes(
    boxes: np.ndarray, classes: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 (n, 4) and classes int32 (n,) as ``count`` rows; -1 is absent.

    Raises:
      UserError: there are more than ``count``; none is ever cut.
    """
    if len(boxes) > count:
        raise UserError(
            f"an image has {len(boxes)} boxes, more than the {count} that batches have "
            "room for; raise that number"
        )
    padded = np.zeros((count, 4), np.float32), np.full(count, -1, np.int32)
    padded[0][: len(boxes)], padded[1][: len(boxes)] = boxes, classes
    return padded


def _resized(
    pixels: np.ndarray, size: tuple[int, int], interpolation: str
) -> np.ndarray:
    """A uint8 image (h, w, 3) at another size, as Pillow resizes it."""
    method = Image.Resampling[interpolation.upper()]
    resized = images.to_pillow(pixels).resize((size[1], size[0]), method)
    return np.asarray(resized)


@dataclasses.dataclass(frozen=True)
class TrainingChunks:
    """Makes chunk ``number`` of the training batches that start at ``first_step``."""

    prepared: PreparedImages
    order: BucketOrder
    first_step: int
    layout: Layout
    flip: bool
    skips: bool

    def __call__(self, number: int) -> Chunk:
        """Reads the images; a broken one is returned as an error string."""
        places = self.layout.places(number)
        size = self.layout.batch_size
        batch, first = divmod(places.start, size)
        step = self.first_step + batch
        chosen = self.order.batch(step)[first : first + len(places)]
        bucket = self.order.buckets[chosen[0]]
        chunk = self.prepared.empty(bucket, len(places))
        chunk["index"][:] = step * size + first + np.arange(len(places))
        skipped: list[str] = []
        for row, index in enumerate(map(int, chosen)):
            try:
                self._write(index, chunk, row, skipped)
            except UserError as error:
                return {"error": str(error)}
        return chunk | {"skipped": "\n".join(skipped)}

    def _write(self, index: int, chunk: Chunk, row: int, skipped: list[str]) -> None:
        """Writes an example, or one of the same bucket in place of a broken one."""
        buckets = self.order.buckets
        for attempt in range(1 + _REPLACEMENTS):
            rng = self.order.generator(int(chunk["index"][row]), attempt)
            if attempt:
                index = int(rng.choice(np.flatnonzero(buckets == buckets[index])))
            flip = self.flip and rng.random() < 0.5
            try:
                return self.prepared.write(index, chunk, row, flip)
            except UserError as error:
                if not self.skips:
                    raise
                skipped.append(str(error))
        raise UserError(f"{skipped[-1]}; {_REPLACEMENTS} replacements are broken too")


@dataclasses.dataclass(frozen=True)
class EvaluationChunks:
    """Makes chunk ``number`` of the batches of ``evaluation_order``."""

    prepared: PreparedImages
    batches: np.ndarray
    layout: Layout
    skips: bool

    def __call__(self, number: int) -> Chunk:
        """Reads the images; a broken image is a filler, or an error string."""
        places = self.layout.places(number)
        batch, first = divmod(places.start, self.layout.batch_size)
        batch_images = self.batches[batch]
        # The first of a batch is never a filler.
        bucket = self.prepared.buckets[batch_images[0]]
        chunk = self.prepared.empty(bucket, len(places))
        skipped: list[str] = []
        chosen = batch_images[first : first + len(places)]
        for row, index in enumerate(map(int, chosen)):
            if index < 0:
                continue
            try:
                self.prepared.write(index, chunk, row, flip=False)
            except UserError as error:
                if not self.skips:
                    return {"error": str(error)}
                skipped.append(str(error))
            else:
                chunk["index"][row] = index
        return chunk | {"skipped": "\n".join(skipped)}


def evaluation_order(buckets: np.ndarray, batch_size: int) -> np.ndarray:
    """The images of each batch, int32 (steps, batch_size): each once, -1 for fillers.

    Landscapes come first, in the order of the source.
    """
    batches = []
    for bucket in np.unique(buckets):
        members = np.flatnonzero(buckets == bucket)
        padded = np.full(-(-len(members) // batch_size) * batch_size, -1, np.int32)
        padded[: len(members)] = members
        batches.append(padded.reshape(-1, batch_size))
    return np.concatenate(batches)


def steps_per_epoch(source: Source, data: DetectionDataConfig, batch_size: int) -> int:
    """Training batches that hold every image of a source at least once."""
    buckets = PreparedImages(source, data).buckets
    return BucketOrder(buckets, batch_size, seed=0).epoch_steps


def training_batches(
    source: Source,
    data: DetectionDataConfig,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    *,
    mesh: Mesh,
    flip: bool = True,
    skipped: list[str] | None = None,
) -> Generator[Batch]:
    """Endless training batches from a step on, sharded over the devices of a mesh.

    Images are read, decoded and resized ahead of the step. Each process reads its rows
    of a batch; the batches do not depend on their number.

    Args:
      source: the images to train on.
      data: how images are prepared and read.
      batch_size: of the global batch.
      seed: of order and flips.
      first_step: of the run, from 0.
      mesh: of the devices.
      flip: mirror each image with probability one half.
      skipped: gets a sentence for each broken image that was replaced.

    Raises:
      UserError: an image is broken and ``data.on_error`` is "stop".
    """
    prepared = PreparedImages(source, data)
    order = BucketOrder(prepared.buckets, batch_size, seed)
    layout = _layout(prepared, batch_size)
    skips = data.on_error == "skip"
    chunks = TrainingChunks(prepared, order, first_step, layout, flip, skips)
    batches = host_batches(chunks, _reading(data))
    yield from placed(batches, mesh, [] if skipped is None else skipped)


def evaluation_batches(
    source: Source,
    data: DetectionDataConfig,
    batch_size: int,
    *,
    mesh: Mesh,
    skipped: list[str] | None = None,
) -> Generator[Batch]:
    """Every image once, as ``training_batches`` but in order and unflipped.

    With ``data.on_error="skip"``, a broken image is left out and noted in ``skipped``.

    Raises:
      UserError: an image is broken and ``data.on_error`` is "stop".
    """
    prepared = PreparedImages(source, data)
    order = evaluation_order(prepared.buckets, batch_size)
    layout = _layout(prepared, batch_size)
    chunks = EvaluationChunks(prepared, order, layout, data.on_error == "skip")
    batches = host_batches(chunks, _reading(data), len(order))
    yield from placed(batches, mesh, [] if skipped is None else skipped)


def _layout(prepared: PreparedImages, batch_size: int) -> Layout:
    return batch_layout(batch_size, (*prepared.shapes[0], 3))


def _reading(data: DetectionDataConfig) -> DataConfig:
    """The part of a config that reading ahead needs."""
    return DataConfig(
        num_threads=data.num_threads, prefetch_batches=data.prefetch_batches
    )
