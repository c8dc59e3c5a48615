"""Pictures of a batch as the net sees it."""

import dataclasses
import functools
import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import rich.console
from matplotlib.figure import Figure

from resnet_jax.analysis import pages, plots
from resnet_jax.config import Config, resolve
from resnet_jax.config.schema import AugmentationConfig, changed_fields
from resnet_jax.console import make_console, say
from resnet_jax.data.batch import gather
from resnet_jax.data.chunks import Chunk, EvaluationChunks, TrainingChunks, join
from resnet_jax.data.dataset import Dataset, open_dataset
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
from resnet_jax.storage import expand, writing

SHOWN = 32
"""Images that are shown by default."""

_PAGE = ".html"


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
        return plots.pictures_figure(self.pixels, self.captions, title)

    def png(self) -> bytes:
        """The figure as a PNG file."""
        file = io.BytesIO()
        self.figure().savefig(file, format="png", dpi=100)
        return file.getvalue()

    _repr_png_ = png


def show_data(
    config: Any,
    *,
    split: str = "train",
    images: int = SHOWN,
    out: str | os.PathLike[str] | None = None,
    console: rich.console.Console | None = None,
) -> SeenBatch:
    """The first batch of a config's data as the net sees it, without training.

    Args:
      config: made by a config file's ``get_config``, or a ``Config``.
      split: "train" gives the batch of the run's first step, with its augmentation;
        "test" and "holdout" give the first examples of the split as they are tested.
      images: how many to return, at most the batch.
      out: a .png, .svg, .pdf or .html file for the pictures.
      console: where to print; standard output by default.

    Raises:
      UserError: a fault in config or data, or the file cannot be written.
    """
    config = resolve(config)
    if out is not None:
        _check_file(out)
    batch = first_batch(config, open_dataset(config), split=split, count=images)
    if out is not None:
        title = f"{config.data.name}, {describe_batch(split, config)}"
        if expand(out).suffix.lower() == _PAGE:
            with writing(out) as temporary:
                temporary.write_text(_page(title, batch, config), "utf-8")
        else:
            plots.save(batch.figure(title), out)
        say(console or make_console(), f"{len(batch.labels)} images: {expand(out)}")
    return batch


def _check_file(out: str | os.PathLike[str]) -> None:
    """Raises UserError if pictures cannot be written there."""
    kinds = (*plots.SUFFIXES, _PAGE)
    kind = expand(out).suffix.lower()
    if kind not in kinds:
        raise UserError(f"{out} must end in {', '.join(kinds[:-1])} or {kinds[-1]}")
    if kind != _PAGE:
        plots.check_file(out)


def _page(title: str, batch: SeenBatch, config: Config) -> str:
    sections = ("data.", "augmentation.", "training.global_batch_size")
    changed = changed_fields(config).items()
    fields = {name: value for name, value in changed if name.startswith(sections)}
    return pages.page(
        title,
        pages.paragraph(
            f"{len(batch.labels)} images as the net sees them; the normalisation is "
            "undone for display.",
            "note",
        ),
        pages.pictures(batch.pixels, batch.captions),
        pages.heading("Config"),
        pages.paragraph("Fields of data and augmentation that are not the default."),
        pages.facts(fields),
    )


def describe_batch(split: str, config: Config) -> str:
    """What ``first_batch`` returns, in a few words."""
    if split == "train":
        return f"batch of the first step, seed {config.seed}"
    return f"first examples of the {split} split"


def first_batch(
    config: Config,
    dataset: Dataset,
    *,
    split: str = "train",
    count: int = SHOWN,
    statistics: PixelStatistics | None = None,
    step: int = 1,
) -> SeenBatch:
    """The first ``count`` examples of a batch; see ``show_data``.

    Reads a whole training batch, because mixing pairs its two ends. If broken images
    are skipped, their replacements may differ from those of a run with resident data.

    Args:
      config: of the run.
      dataset: its data.
      split: "train", "holdout" or "test".
      count: examples to return, at most the batch.
      statistics: of the training pixels, if they are known; otherwise measured.
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
    if statistics is None:
        statistics = dataset.train.statistics()
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
