"""The learning rate: a pure function of the step and of the errors so far.

The paper's recipes need both: drops at given steps (CIFAR), a drop when the held-out
error plateaus (ImageNet), a small rate until the training error is below 80 % (depth
110). ``ScheduleState`` is their memory, and part of checkpoints.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from resnet_jax.config import Derived
from resnet_jax.config.schema import OptimizerConfig, ScheduleConfig


@flax.struct.dataclass
class ScheduleState:
    """What the learning rate depends on besides the step.

    Attributes:
      warming: bool, whether the warm-up by training error is still running.
      error_average: moving average of the batches' training error.
      scale: product of the factors of all plateaus so far.
      best_error: lowest held-out error that counted as an improvement.
      bad_evaluations: evaluations since then, without improvement.
    """

    warming: jax.Array
    error_average: jax.Array
    scale: jax.Array
    best_error: jax.Array
    bad_evaluations: jax.Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate of a run; its methods are pure and may run inside jit."""

    optimizer: OptimizerConfig
    config: ScheduleConfig
    derived: Derived

    def init(self) -> ScheduleState:
        """The state before the first step."""
        return ScheduleState(
            warming=jnp.array(self.config.warmup_until_error is not None),
            error_average=jnp.ones(()),
            scale=jnp.ones(()),
            best_error=jnp.array(jnp.inf),
            bad_evaluations=jnp.zeros((), jnp.int32),
        )

    def rate(self, state: ScheduleState, step: jax.Array) -> jax.Array:
        """The learning rate of the step that follows ``step`` completed steps."""
        rate = self._by_step(step) * state.scale
        warmup = self.derived.warmup_steps
        initial = self.config.warmup_initial_learning_rate
        if warmup:
            progress = jnp.minimum(1.0, (step + 1) / warmup)
            warming = initial + (rate - initial) * progress
            rate = (
                jnp.where(progress < 1, warming, rate) if initial else rate * progress
            )
        if self.config.warmup_learning_rate is not None:
            rate = jnp.where(state.warming, self.config.warmup_learning_rate, rate)
        return jnp.asarray(rate, jnp.float32)

    def _by_step(self, step: jax.Array) -> jax.Array:
        peak = self.optimizer.learning_rate
        if self.config.kind == "piecewise":
            drops = dict.fromkeys(self.derived.boundaries, self.config.factor)
            return optax.piecewise_constant_schedule(peak, drops)(step)
        warmup, final = self.derived.warmup_steps, self.config.final_learning_rate
        length = max(1, self.derived.steps - warmup)
        after_warmup = jnp.maximum(step - warmup, 0)
        if self.config.kind == "cosine":
            share = final / peak if peak else 0.0
            return optax.cosine_decay_schedule(peak, length, share)(after_warmup)
        if self.config.kind == "polynomial":
            power = self.config.power
            return optax.polynomial_schedule(peak, final, power, length)(after_warmup)
        return jnp.asarray(peak)

    def after_batch(self, state: ScheduleState, error: jax.Array) -> ScheduleState:
        """The state after a batch with this training error, a share in [0, 1]."""
        if self.config.warmup_until_error is None:
            return state
        decay = self.config.warmup_error_decay
        average = decay * state.error_average + (1 - decay) * error
        # Once over, the warm-up never returns.
        warming = state.warming & (average >= self.config.warmup_until_error)
        return dataclasses.replace(state, error_average=average, warming=warming)

    def after_evaluation(self, state: ScheduleState, error: jax.Array) -> ScheduleState:
        """The state after a held-out error; lowers the rate on a plateau."""
        if self.config.kind != "plateau":
            return state
        better = error < state.best_error - self.config.plateau_min_improvement
        bad = jnp.where(better, 0, state.bad_evaluations + 1)
        plateau = bad >= self.config.plateau_patience
        return dataclasses.replace(
            state,
            best_error=jnp.where(better, error, state.best_error),
            scale=jnp.where(plateau, state.scale * self.config.factor, state.scale),
            bad_evaluations=jnp.where(plateau, 0, bad),
        )
