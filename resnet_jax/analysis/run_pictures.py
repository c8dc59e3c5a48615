"""Pictures for the report of a run: its data, and its mistakes on the test set."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import rich.console

from resnet_jax.analysis import pages
from resnet_jax.analysis.batches import describe_batch, first_batch
from resnet_jax.analysis.evaluation_page import mistake_parts
from resnet_jax.evaluation.evaluate import evaluate_nets
from resnet_jax.evaluation.evaluator import describe_error
from resnet_jax.evaluation.nets import TrainedNet, load_net
from resnet_jax.evaluation.saved_run import SavedRun


def run_pictures(
    workdir: str | os.PathLike[str], result: Mapping[str, Any]
) -> list[str]:
    """The first batch and the mistakes of a finished run, as parts of a page.

    A test set of at most ``data.resident_mib`` is tested once more, which costs as much
    as an evaluation in training. For a larger one, a sentence names the command that
    does.

    Args:
      workdir: of the run.
      result: the content of its result.json.

    Raises:
      UserError: the data or the last checkpoint is missing, damaged or another one.
    """
    net = load_net(workdir)
    run = net.run
    assert run is not None, workdir  # a workdir is a run
    return [*_batch(run), *_mistakes(net, run, result)]


def _batch(run: SavedRun) -> list[str]:
    seen = first_batch(run.config, run.dataset, run.statistics)
    return [
        pages.heading("The data"),
        pages.paragraph(
            f"{len(seen.labels)} images of the {describe_batch('train', run.config)}, "
            "as the net saw them; the normalisation is undone for display."
        ),
        pages.pictures(seen.pixels, seen.captions),
    ]


def _mistakes(net: TrainedNet, run: SavedRun, result: Mapping[str, Any]) -> list[str]:
    parts, test = [pages.heading("Mistakes on the test set")], run.dataset.test
    most = run.config.data.resident_mib
    if test.nbytes > most * 2**20:
        text = (
            f"The test set exceeds data.resident_mib={most} and was not tested again "
            f"for this page. To see its mistakes: resnet-jax evaluate --workdir "
            f"{net.source} --html mistakes.html"
        )
        return [*parts, pages.paragraph(text, "note")]
    pictures: dict[int, np.ndarray] = {}
    (found,) = evaluate_nets(
        [net],
        on_mistake=pictures.__setitem__,
        console=rich.console.Console(quiet=True),
    )["nets"]
    if found["errors"] != result["test_errors"]:
        # Other batches round differently, and a run may skip broken images.
        text = describe_error("test", found["errors"], found["count"])
        parts.append(pages.paragraph(f"Tested again for this page: {text}.", "note"))
    if not found["mistakes"]:
        parts.append(pages.paragraph("None."))
    return [*parts, *mistake_parts(found, pictures)]
