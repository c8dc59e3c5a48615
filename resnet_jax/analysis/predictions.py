"""Predictions of pictures: a table on the screen, JSON lines, an HTML page."""

import contextlib
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
from rich.cells import cell_len

from resnet_jax.analysis import pages
from resnet_jax.analysis.activation_maps import (
    class_activation_map,
    has_activation_maps,
    heat_over,
)
from resnet_jax.console import make_console, say
from resnet_jax.data.pictures import Picture, read_picture
from resnet_jax.data.sources.folders import image_suffixes, images_below
from resnet_jax.errors import UserError, printable
from resnet_jax.evaluation.classifier import Classifier, Prediction
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.storage import expand, writing

MOST_ON_PAGE = 100
"""Images on the page of ``predict_files``: a browser holds them all."""

_PERCENT = len("probability")


def predict_files(
    classifier: Classifier,
    paths: Sequence[str | os.PathLike[str]],
    *,
    top: int = 5,
    json_path: str | os.PathLike[str] | None = None,
    html_path: str | os.PathLike[str] | None = None,
    console: rich.console.Console | None = None,
    faults: rich.console.Console | None = None,
) -> tuple[int, int]:
    """Prints the predictions of image files as they are computed, and writes them.

    Args:
      classifier: see ``Classifier``.
      paths: image files, and folders, whose images at any depth are taken in the order
        of their names.
      top: the number of classes of each image.
      json_path: file for one JSON object per line: image, classes, names,
        probabilities.
      html_path: file for a page of the first ``MOST_ON_PAGE`` images.
      console: None means standard output.
      faults: gets a sentence for each broken image or folder; None means standard
        error.

    Returns:
      The numbers of predicted images, and of broken images and folders.

    Raises:
      UserError: no image can be read, or a file cannot be written.
    """
    console = console or make_console()
    faults = faults or rich.console.Console(stderr=True)
    files, broken = image_files(paths)
    alone = len(files) == 1 and not broken
    for sentence in broken:
        say(faults, f"resnet-jax: {sentence}")

    def on_fault(sentence: str) -> None:
        broken.append(sentence)
        say(faults, f"resnet-jax: {sentence}")

    show = _table(console, files, classifier.names)
    number = 0
    kept: list[Prediction] = []
    with json_lines(json_path) as write:
        for found in classifier.stream(files, top, None if alone else on_fault):
            show(found)
            write(json.dumps(dataclasses.asdict(found)))
            number += 1
            if len(kept) < MOST_ON_PAGE:
                kept.append(found)
    if not number:
        raise UserError(f"none of the {len(files)} images can be read")
    if html_path is not None:
        page = predictions_page(classifier, [p.image for p in kept], kept, number)
        with writing(html_path) as temporary:
            temporary.write_text(page, "utf-8")
        say(console, f"page: {html_path}")
    return number, len(broken)


def image_files(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[str], list[str]]:
    """Image files, those in folders included; sentences on folders without images.

    Raises:
      UserError: there is no file.
    """
    files: list[str] = []
    faults: list[str] = []
    for path in map(os.fsdecode, paths):
        if not os.path.isdir(path):
            files.append(path)
            continue
        before = len(files) + len(faults)
        found = images_below(Path(path), Counter(), faults.append)
        files += [os.path.join(path, name) for name in found]
        if len(files) + len(faults) == before:
            faults.append(f"folder {path} holds no images ({image_suffixes()})")
    if not files:
        count = len(faults)
        others = f" (and {count - 1} more folders without images)" if count > 1 else ""
        raise UserError(f"{faults[0]}{others}" if faults else "there are no images")
    return files, faults


def _table(
    console: rich.console.Console, files: Sequence[str], names: Sequence[str]
) -> Callable[[Prediction], None]:
    """Prints the head of a table; returns what prints the rows of a prediction.

    A terminal gets columns that fit; long paths lose their beginning and long names
    their end. A file or pipe gets them whole.
    """
    widths = [max(map(cell_len, map(_cell, texts))) for texts in (files, names)]
    widths = [max(width, len("image")) for width in widths]
    if console.is_terminal:
        rest = console.width - _PERCENT - 4
        widths[1] = min(widths[1], max(rest // 3, rest - widths[0]))
        widths[0] = min(widths[0], rest - widths[1])

    def row(image: str, name: str, percent: str) -> str:
        cells = _fitted(image, widths[0], from_end=True), _fitted(name, widths[1])
        return f"{cells[0]}  {cells[1]}  {percent:>{_PERCENT}}"

    def show(found: Prediction) -> None:
        shares = [f"{100 * share:.1f} %" for share in found.probabilities]
        images = [_cell(found.image), *[""] * (len(shares) - 1)]
        rows = zip(images, map(_cell, found.names), shares, strict=True)
        say(console, "\n".join(row(*cells) for cells in rows))

    say(console, row("image", "class", "probability"))
    return show


def _cell(text: str) -> str:
    """Text on one line, without control characters."""
    return printable(text).replace("\n", "\\n")


def _fitted(text: str, width: int, from_end: bool = False) -> str:
    """Text cut or filled to the width of a column."""
    if cell_len(text) <= width:
        return text + " " * (width - cell_len(text))
    while cell_len(text) > width - 1:
        text = text[1:] if from_end else text[:-1]
    filled = text + " " * (width - 1 - cell_len(text))
    return f"…{filled}" if from_end else f"{text}…".ljust(width)


@contextlib.contextmanager
def _writing(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def json_lines(path: str | os.PathLike[str] | None) -> Iterator[Callable[[str], None]]:
    """A function that writes a line to a file at once; without a path, to none."""
    if path is None:
        yield lambda text: None
        return
    with _writing(path):
        file = expand(path).open("wb", buffering=0)

    def write(text: str) -> None:
        with _writing(path):
            file.write(f"{text}\n".encode())

    with file:
        yield write


# The page


def predictions_page(
    classifier: Classifier,
    images: Sequence[Picture],
    predictions: Sequence[Prediction],
    number: int | None = None,
) -> str:
    """An HTML page: pictures, their likeliest classes, and evidence for the first.

    Args:
      classifier: that predicted.
      images: the pictures, which are read again and embedded.
      predictions: one for each picture.
      number: of all predicted images, if the page shows the first ones alone.

    Raises:
      UserError: a picture cannot be read any more.
    """
    net = classifier.net
    notes = [f"{net.name} from {net.source}; {classifier.protocol.describe()}"]
    if number is not None and number > len(predictions):
        notes.append(f"The first {len(predictions)} of {number:,} images.")
    activation = _compiled_map(net) if has_activation_maps(net) else None
    if activation is not None:
        notes.append(
            "The second picture is the net's own view of the first. The warmer a "
            "region, the more it adds to the logit of the likeliest class (class "
            "activation map, Zhou et al. 2016)."
        )
    parts = [pages.paragraph(note, "note") for note in notes]
    for image, prediction in zip(images, predictions, strict=True):
        pixels = read_picture(image, net.channels, prediction.image)
        figures = [pages.picture(pixels, "the picture")]
        if activation is not None:
            view = classifier.own_view.views(pixels)[0]
            heat = activation(view[None], [prediction.classes[0]])[0]
            caption = f"evidence for {prediction.names[0]}"
            figures.append(pages.picture(heat_over(view, heat), caption))
        inner = "\n".join([*figures, _bars(prediction)])
        parts.append(pages.heading(prediction.image))
        parts.append(f'<div class="beside">\n{inner}\n</div>')
    return pages.page("Predictions", *parts)


def _compiled_map(net: TrainedNet) -> Any:
    """``class_activation_map`` of a net, compiled with its variables as arguments."""

    @jax.jit
    def run(variables: Any, images: jax.Array, classes: jax.Array) -> jax.Array:
        own = dataclasses.replace(net, variables=variables)
        return class_activation_map(own, images, classes)

    return lambda images, classes: np.asarray(
        run(net.variables, images, np.array(classes))
    )


def _bars(prediction: Prediction) -> str:
    rows = []
    for name, share in zip(prediction.names, prediction.probabilities, strict=True):
        percent = f"{100 * share:.1f} %"
        rows.append(
            f"<li><span>{pages.escape(name)}</span><span>{percent}</span>"
            f'<i style="width:{100 * share:.1f}%"></i></li>'
        )
    return "\n".join(['<ol class="bars">', *rows, "</ol>"])
