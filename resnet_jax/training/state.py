"""The state of a run on the devices, and the learner that makes and shards it."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.config import Config, Derived, derive
from resnet_jax.config.build import build_model
from resnet_jax.data.transforms import PixelStatistics, run_key
from resnet_jax.evaluation.metrics import Sums
from resnet_jax.training.optimizer import make_optimizer
from resnet_jax.training.schedule import Schedule, ScheduleState


@flax.struct.dataclass
class TrainState:
    """Everything that a training step changes, and what evaluation needs.

    Attributes:
      step: completed steps, int32.
      params, batch_stats: the net's variables, float32.
      opt_state: the optimizer's state, float32.
      ema: moving averages of params and batch_stats, or None.
      schedule: the memory of the learning rate.
      rng: the run's random key; each step folds in its number.
      statistics: of the training pixels, constant.
      learning_rate: of the last step, float32.
      sums: training metrics since the last row of metrics.jsonl, such as ``Sums``.
      first_bad_step: the first step with a loss that is not finite, or -1.
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
    sums: Any
    first_bad_step: jax.Array

    def evaluation_variables(self) -> dict[str, Any]:
        """The variables to evaluate: the moving averages if there are any."""
        if self.ema is not None:
            return self.ema
        return {"params": self.params, "batch_stats": self.batch_stats}

    def with_evaluation_variables(self, variables: dict[str, Any]) -> "TrainState":
        """The state with these variables in place of ``evaluation_variables()``."""
        if self.ema is not None:
            return dataclasses.replace(self, ema=variables)
        return dataclasses.replace(self, **variables)


@dataclasses.dataclass(frozen=True)
class Learner:
    """A net with its optimizer, schedule and devices: the parts of a step.

    Attributes:
      config: of the run.
      derived: lengths in steps.
      mesh: the devices.
      model: the net.
      optimizer: the update, without the learning rate.
      schedule: the learning rate.
      image_shape: (h, w, c) of the net's input in training.
    """

    config: Any
    derived: Derived
    mesh: Mesh
    model: nn.Module
    optimizer: optax.GradientTransformation
    schedule: Schedule
    image_shape: tuple[int, ...]

    def init(self, statistics: PixelStatistics) -> TrainState:
        """The state before the first step: a pure function of ``config.seed``."""
        init_key, _ = jax.random.split(jax.random.key(self.config.seed))
        variables: dict[str, Any] = {
            "batch_stats": {},  # Nets without batch normalisation have none.
            **self.init_variables(init_key),
        }
        averaged = self.config.optimizer.ema_decay is not None
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            opt_state=self.optimizer.init(variables["params"]),
            ema=dict(variables) if averaged else None,
            schedule=self.schedule.init(),
            rng=run_key(self.config.seed),
            statistics=statistics,
            learning_rate=jnp.zeros(()),
            sums=self.zero_sums(),
            first_bad_step=jnp.full((), -1, jnp.int32),
        )

    def init_variables(self, key: jax.Array) -> dict[str, Any]:
        """The net's variables before the first step; inside jit."""
        image = jnp.zeros((1, *self.image_shape))
        return dict(self.model.init(key, image, train=False))

    def zero_sums(self) -> Any:
        """The training metrics of no examples."""
        return Sums.zeros()

    def fresh_state(
        self, statistics: PixelStatistics, variables: dict[str, Any] | None = None
    ) -> TrainState:
        """The state before the first step, on the devices.

        ``variables`` are host arrays to start from, in place of those of ``init``.
        """
        state = jax.jit(self.init, out_shardings=self.shardings)(statistics)
        if variables is None:
            return state
        variables = jax.device_get({"batch_stats": {}} | variables)
        new = variables if state.ema is None else {**variables, "ema": variables}
        # The step donates the state, so the averages need buffers of their own.
        shardings = {name: getattr(self.shardings, name) for name in new}
        return state.replace(**parallel.place_whole(new, shardings))

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; computes nothing."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            self._shapes,
            self.shardings,
        )

    @property
    def has_mean_image(self) -> bool:
        """Whether each pixel has its own mean."""
        return self.config.data.normalization == "per_pixel_mean"

    @functools.cached_property
    def shardings(self) -> TrainState:
        """The sharding of every array of the state.

        With ``parallel.fully_sharded`` parameters, optimizer state and averages are cut
        over the devices. Everything else is replicated.
        """
        same = jax.tree.map(lambda _: parallel.replicated(self.mesh), self._shapes)
        if not self.config.parallel.fully_sharded:
            return same
        cut = {
            name: getattr(self._shapes, name) for name in ("params", "opt_state", "ema")
        }
        return same.replace(**parallel.fully_sharded(cut, self.mesh))

    @functools.cached_property
    def _shapes(self) -> TrainState:
        shape = self.image_shape
        if not self.has_mean_image:
            shape = (1, 1, shape[-1])
        pixels: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.eval_shape(self.init, PixelStatistics(mean=pixels, std=pixels))


def make_learner(
    config: Config,
    mesh: Mesh,
    *,
    num_examples: int,
    num_classes: int,
    image_shape: tuple[int, ...],
) -> Learner:
    """Builds the net, optimizer and schedule of a config.

    Args:
      config: of the run.
      mesh: the devices.
      num_examples: training examples.
      num_classes: logits of the net.
      image_shape: (h, w, c) of the net's input in training.

    Raises:
      UserError: the batch does not divide over the devices, or an option of the net or
        a frozen part does not exist.
    """
    parallel.check_divides(
        config.training.global_batch_size,
        mesh.size,
        config.training.micro_batches,
        config.model.batch_norm_groups,
    )
    derived = derive(config, num_examples)
    return Learner(
        config=config,
        derived=derived,
        mesh=mesh,
        model=build_model(config.model, num_classes),
        optimizer=make_optimizer(config.optimizer, config.model.frozen),
        schedule=Schedule(config.optimizer, config.schedule, derived),
        image_shape=image_shape,
    )
