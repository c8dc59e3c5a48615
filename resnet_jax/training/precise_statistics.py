"""The batch statistics of a run's last net, over many of its training examples.

While it trains, a net's running averages follow weights that change: they lag behind,
and the steps that they remember are few where batches are large. Statistics recomputed
with the final weights have neither fault ("PreciseBN" of Wu & Johnson 2021, section 3).
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.config.schema import AugmentationConfig
from resnet_jax.data.batch import Batch, Feed, gather
from resnet_jax.data.transforms import PixelStatistics, augment_and_mix
from resnet_jax.errors import UserError
from resnet_jax.models.statistics import add_batch, refuse_without_batch_stats
from resnet_jax.training.setup import Setup
from resnet_jax.training.state import TrainState

_FIELD = "evaluation.precise_statistics_examples"

StatisticsStep = Callable[
    [Any, int, jax.Array, PixelStatistics, Batch | None, Batch], Any
]


def make_statistics_step(
    model: nn.Module, augmentation: AugmentationConfig, mesh: Mesh
) -> StatisticsStep:
    """A jitted function that adds a batch to a net's statistics; see ``add_batch``.

    It takes (variables, batches before, rng, pixel statistics, resident, batch) and
    gives ``batch_stats``. The images are augmented as in the step of that number. The
    variables may be replicated or cut over the devices.
    """

    def statistics_step(variables, seen, rng, pixels, resident, batch):
        variables = parallel.gathered(variables, mesh)
        images, _ = gather(resident, batch)
        key = jax.random.fold_in(rng, seen)
        images, _ = augment_and_mix(key, images, pixels, augmentation)
        return add_batch(model, variables, seen, images)

    same, cut = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    return jax.jit(
        statistics_step,
        in_shardings=(None, same, same, same, same, cut),
        out_shardings=same,
    )


def with_precise_statistics(
    setup: Setup, state: TrainState, feed: Feed, num_batches: int
) -> TrainState:
    """The state with batch statistics over the run's first ``num_batches`` batches.

    They are those of the weights that are evaluated: the averaged ones where there are
    any. Images, augmentation and batch size are those of the run's first steps, so that
    the same state has the same statistics, whenever and however often they are taken.
    Nothing else of the state changes.

    Args:
      setup: of the run.
      state: of the run.
      feed: of its training set.
      num_batches: at least 1.

    Raises:
      UserError: the net has no batch normalisation.
    """
    config, variables = setup.config, state.evaluation_variables()
    refuse_without_batch_stats(setup.model, variables)
    step = make_statistics_step(setup.model, config.augmentation, setup.mesh)
    batches = feed.training_batches(0, config.training.global_batch_size, config.seed)
    with contextlib.closing(batches):
        for seen, batch in enumerate(itertools.islice(batches, num_batches)):
            batch_stats = step(
                variables, seen, state.rng, state.statistics, feed.resident, batch
            )
            variables = variables | {"batch_stats": parallel.settled(batch_stats)}
    if state.ema is not None:
        return dataclasses.replace(state, ema=variables)
    return dataclasses.replace(state, batch_stats=variables["batch_stats"])


def check_precise_statistics(setup: Setup) -> None:
    """Raises UserError where a config asks for statistics that its net has not."""
    examples = setup.config.evaluation.precise_statistics_examples
    if examples and not setup.abstract_state().batch_stats:
        raise UserError(
            f"{_FIELD}={examples} needs batch normalisation, and "
            f"{setup.config.model.name} has none: set it to 0"
        )
