"""Show a batch of a config's data, before any training."""

import functools
import os
from typing import Any

import rich.console

from resnet_jax.analysis import pages, plots
from resnet_jax.analysis.batches import SHOWN, SeenBatch, describe_batch, first_batch
from resnet_jax.config import Config, resolve
from resnet_jax.config.schema import changed_fields
from resnet_jax.console import make_console, say
from resnet_jax.data.dataset import open_dataset
from resnet_jax.errors import UserError
from resnet_jax.storage import expand, writing
from resnet_jax.training.pretrained import pixel_statistics

_PAGE = ".html"


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
    console = console or make_console()
    dataset = open_dataset(config)
    statistics = pixel_statistics(config, dataset, functools.partial(say, console))
    batch = first_batch(config, dataset, statistics, split=split, count=images)
    if out is not None:
        title = f"{config.data.name}, {describe_batch(split, config)}"
        if expand(out).suffix.lower() == _PAGE:
            with writing(out) as temporary:
                temporary.write_text(_page(title, batch, config), "utf-8")
        else:
            plots.save(batch.figure(title), out)
        say(console, f"{len(batch.labels)} images: {expand(out)}")
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
