"""The state of a run on the devices: all that a step changes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh

from resnet_jax import parallel
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.evaluation.metrics import Sums
from resnet_jax.training.schedule import Schedule, ScheduleState


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds of the devices.

    Attributes:
      step: completed steps, int32.
      params, batch_stats: the net's variables, float32.
      opt_state: the optimizer's, float32.
      ema: moving averages of params and batch_stats, or None.
      schedule: what the learning rate remembers.
      rng: the key of which each step folds in its number.
      statistics: of the training pixels; with them the state can be evaluated alone.
      learning_rate: of the last step, float32.
      sums: training metrics since the last row of metrics.jsonl.
      first_bad_step: the first step whose loss was not finite, or -1.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    schedule: ScheduleState
    rng: jax.Array
    statistics: PixelStatistics
    learning_rate: jax.Array
    sums: Sums
    first_bad_step: jax.Array

    def evaluation_variables(self) -> dict[str, Any]:
        """The variables to evaluate: the averaged ones where there are any."""
        if self.ema is not None:
            return self.ema
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    statistics: PixelStatistics,
    image_shape: tuple[int, ...],
    seed: int,
    averaged: bool,
) -> TrainState:
    """The state before the first step; pure, and the same for the same seed."""
    init_key, rng = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, jnp.zeros((1, *image_shape)), train=False)
    params = variables["params"]
    # Nets without batch normalisation have no such collection.
    batch_stats = variables.get("batch_stats", {})
    ema = {"params": params, "batch_stats": batch_stats} if averaged else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema=ema,
        schedule=schedule.init(),
        rng=rng,
        statistics=statistics,
        learning_rate=jnp.zeros(()),
        sums=Sums.zeros(),
        first_bad_step=jnp.full((), -1, jnp.int32),
    )


def state_shardings(
    state: TrainState, mesh: Mesh | AbstractMesh, fully_sharded: bool
) -> TrainState:
    """The sharding of every leaf of a state.

    Args:
      state: of arrays or of their shapes.
      mesh: the devices.
      fully_sharded: parameters, the optimizer's state and the averages are cut over
        the devices; the rest, and all of it otherwise, is replicated.
    """
    same = jax.tree.map(lambda leaf: parallel.replicated(mesh), state)
    if not fully_sharded:
        return same
    cut = {
        name: parallel.fully_sharded(getattr(state, name), mesh)
        for name in ("params", "opt_state", "ema")
    }
    return same.replace(**cut)
