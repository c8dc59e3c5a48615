"""Pictures of a batch as the net sees it."""

import dataclasses
import functools
import io
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from matplotlib.figure import Figure

from resnet_jax.analysis.gallery import gallery
from resnet_jax.config import Config
from resnet_jax.config.schema import AugmentationConfig
from resnet_jax.data.batch import gather
from resnet_jax.data.chunks import Chunk, EvaluationChunks, TrainingChunks, join
from resnet_jax.data.dataset import Dataset
from resnet_jax.data.feeds import batch_layout, training_order
from resnet_jax.data.sources.imagenet import readable_names
from resnet_jax.data.split import Split
from resnet_jax.data.transforms import (
    MAX_PIXEL,
    PixelStatistics,
    augment_and_mix,
    normalize,
    run_key,
    to_unit,
)
from resnet_jax.errors import UserError

SHOWN = 32
"""Images that are shown by default."""


@dataclasses.dataclass(frozen=True)
class SeenBatch:
    """The first examples of a batch, as the net sees them; a picture in notebooks.

    Attributes:
      images: the net's input, float32 (n, h, w, c): augmented, normalised and mixed.
      pixels: the same as pictures, uint8 (n, h, w, c), without the normalisation.
      labels: int32 (n,).
      partners: int32 (n,), the labels of the images that were mixed in.
      share: the weight of ``labels``; 1 if nothing is mixed.
      class_names: in the order of the labels.
    """

    images: np.ndarray
    pixels: np.ndarray
    labels: np.ndarray
    partners: np.ndarray
    share: float
    class_names: tuple[str, ...]

    @property
    def captions(self) -> list[str]:
        """The name of each image's class, or of both with their shares."""
        names = readable_names(self.class_names)
        captions = []
        for own, other in zip(self.labels, self.partners, strict=True):
            caption = names[own]
            if self.share < 1 and own != other:
                share = round(100 * self.share)
                caption += f": {share} %\n{names[other]}: {100 - share} %"
            captions.append(caption)
        return captions

    def figure(self, title: str = "") -> Figure:
        """The pictures with their classes, in rows."""
        return gallery(self.pixels, self.captions, title=title)

    def png(self) -> bytes:
        """The figure as a PNG file."""
        file = io.BytesIO()
        self.figure().savefig(file, format="png", dpi=100)
        return file.getvalue()

    _repr_png_ = png


def describe_batch(split: str, config: Config) -> str:
    """What ``first_batch`` returns, in a few words."""
    if split == "train":
        return f"batch of the first step, seed {config.seed}"
    return f"first examples of the {split} split"


def first_batch(
    config: Config,
    dataset: Dataset,
    statistics: PixelStatistics,
    *,
    split: str = "train",
    count: int = SHOWN,
    step: int = 1,
) -> SeenBatch:
    """The first ``count`` examples of a batch.

    Of the training split, it is the batch of a step. Other splits give their first
    examples, as they are tested.

    Reads a whole training batch, because mixing pairs its two ends. If broken images
    are skipped, a run with resident data may show others in their place.

    Args:
      config: of the run.
      dataset: its data.
      statistics: of the pixels, by which the run normalises.
      split: "train", "holdout" or "test".
      count: examples to return, at most the batch.
      step: whose training batch, from 1. A run of several processes shows the part
        that this process reads.

    Raises:
      UserError: the data are broken, or there is no such split.
    """
    if count < 1:
        raise UserError(f"the number of images must be at least 1, not {count}")
    found = {s.name: s for s in (dataset.train, dataset.holdout, dataset.test) if s}
    if split not in found:
        raise UserError(
            f"there is no split {split!r} to show; choose {' or '.join(found)}"
        )
    if split == "train":
        chunk = _training_chunk(config, found[split], step)
        batch = {name: chunk[name] for name in ("image", "label")}
        key = jax.random.fold_in(run_key(config.seed), step - 1)
        images, share = _augmented(key, batch, statistics, config.augmentation, count)
    else:
        chunk = _tested_chunk(config, found[split], count)
        images, share = normalize(to_unit(chunk["image"]), statistics), None
    pixels = MAX_PIXEL * (images * statistics.std[None] + statistics.mean[None])
    labels = np.asarray(chunk["label"])
    return SeenBatch(
        images=np.asarray(images),
        pixels=np.asarray(pixels).round().clip(0, MAX_PIXEL).astype(np.uint8),
        labels=labels[:count],
        partners=labels[::-1][:count],
        share=1.0 if share is None else float(share),
        class_names=tuple(dataset.class_names),
    )


def _training_chunk(config: Config, split: Split, step: int) -> Chunk:
    """The whole batch of a step, from the host."""
    data, size = config.data, config.training.global_batch_size
    order = training_order(len(split), config.seed, size, data, config.augmentation)
    layout = batch_layout(size, split.training_shape)
    skips = data.on_error == "skip"
    position = (step - 1) * size
    return _read(
        TrainingChunks(split, config.augmentation, order, position, layout, skips),
        config,
    )


def _tested_chunk(config: Config, split: Split, count: int) -> Chunk:
    """The first examples of a split, without the broken ones."""
    layout = batch_layout(min(count, len(split)), split.image_shape)
    skips = config.data.on_error == "skip"
    chunk = _read(EvaluationChunks(split, layout, skips), config)
    whole = chunk["mask"] > 0
    return {name: chunk[name][whole] for name in ("image", "label")}


def _read(chunks: TrainingChunks | EvaluationChunks, config: Config) -> Chunk:
    with ThreadPoolExecutor(config.data.threads) as pool:
        chunk = join([*pool.map(chunks, range(chunks.layout.chunks_per_batch))])
    if "error" in chunk:
        raise UserError(chunk["error"])
    return chunk


@functools.partial(jax.jit, static_argnames=("augmentation", "count"))
def _augmented(
    key: jax.Array,
    batch: Chunk,
    statistics: PixelStatistics,
    augmentation: AugmentationConfig,
    count: int,
) -> tuple[jax.Array, jax.Array | None]:
    """The first images of a batch as its step makes them; see ``augment_and_mix``."""
    images, _ = gather(None, batch)
    images, share = augment_and_mix(key, images, statistics, augmentation)
    return images[:count], share
