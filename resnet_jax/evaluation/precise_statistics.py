"""Batch statistics recomputed with the final weights.

During training the running averages lag behind weights that change, and they cover few
steps if batches are large. Statistics recomputed with the final weights have neither
fault ("PreciseBN" of Wu & Johnson 2021, section 3).
"""

import contextlib
import itertools
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.config import Config
from resnet_jax.data.batch import Feed
from resnet_jax.data.transforms import PixelStatistics, augment_and_mix
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluator import jit_over_batch
from resnet_jax.models.statistics import add_batch, refuse_without_batch_stats


def precise_variables(
    model: nn.Module,
    config: Config,
    mesh: Mesh,
    variables: dict[str, Any],
    statistics: PixelStatistics,
    rng: jax.Array,
    feed: Feed,
    num_batches: int,
) -> dict[str, Any]:
    """Variables with batch statistics over the run's first batches.

    It uses the images, augmentation and batch size of the run's first steps, so the
    result depends on the variables alone, not on when or how often it is computed.
    ``rng`` is ``TrainState.rng``, and ``feed`` the training set's.

    Raises:
      UserError: the net has no batch normalisation.
    """
    refuse_without_batch_stats(model, variables)

    def add(variables, other, images, labels, batch):
        seen, rng, statistics = other
        key = jax.random.fold_in(rng, seen)
        images, _ = augment_and_mix(key, images, statistics, config.augmentation)
        return add_batch(model, variables, seen, images)

    step = jit_over_batch(add, mesh)
    batches = feed.training_batches(0, config.training.global_batch_size, config.seed)
    with contextlib.closing(batches):
        for seen, batch in enumerate(itertools.islice(batches, num_batches)):
            batch_stats = step(variables, (seen, rng, statistics), feed.resident, batch)
            variables = variables | {"batch_stats": parallel.settled(batch_stats)}
    return variables


def check_precise_statistics(config: Config, batch_stats: Any) -> None:
    """Raises UserError if a config asks for statistics that its net lacks."""
    examples = config.evaluation.precise_statistics_examples
    if examples and not batch_stats:
        raise UserError(
            f"evaluation.precise_statistics_examples={examples} needs batch "
            f"normalisation, and {config.model.name} has none: set it to 0"
        )
