"""Layer responses (Fig. 7 of the paper) of a run's net."""

import os
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.analysis.responses import (
    ImageMoments,
    Response,
    ResponseStatistics,
    image_moments,
)
from resnet_jax.data.batch import Batch, gather
from resnet_jax.data.transforms import PixelStatistics, normalize, to_unit
from resnet_jax.training.opened import open_run

MomentsStep = Callable[
    [Any, PixelStatistics, Batch | None, Batch], tuple[ImageMoments, jax.Array]
]


def responses_of_run(
    workdir: str | os.PathLike[str],
    *,
    split: str = "test",
    checkpoint: int | str = "last",
) -> list[Response]:
    """The standard deviation of each 3x3 layer's response; see ``layer_responses``.

    Over all examples of a split, as evaluation sees them. The paper does not say over
    which its own figure is.

    Args:
      workdir: of ``train``.
      split: "test", "holdout" or "train" (centre crops).
      checkpoint: "last", "best" (by the held-out error) or a step.

    Raises:
      UserError: there is no such run, checkpoint or split, or the net has no 3x3
        convolution.
    """
    run = open_run(workdir, split=split, checkpoint=checkpoint)
    feed = run.setup.feed(run.split)
    step = make_moments_step(run.setup.model, run.setup.mesh)
    variables, pixels = run.state.evaluation_variables(), run.state.statistics
    statistics = ResponseStatistics()
    for batch in feed.evaluation_batches(run.setup.evaluation_batch_size):
        statistics.add(*step(variables, pixels, feed.resident, batch))
    return statistics.responses()


def make_moments_step(model: nn.Module, mesh: Mesh) -> MomentsStep:
    """A jitted function of (variables, statistics, resident, batch).

    It gives the batch's ``ImageMoments`` and its mask, whole on every device. The
    variables may be replicated or cut over the devices.
    """

    def moments_step(variables, statistics, resident, batch):
        variables = parallel.gathered(variables, mesh)
        images, _ = gather(resident, batch)
        images = normalize(to_unit(images), statistics)
        return image_moments(model, variables, images), batch["mask"]

    same, cut = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    return jax.jit(
        moments_step, in_shardings=(None, same, same, cut), out_shardings=same
    )
