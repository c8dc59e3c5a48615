"""One optimizer step as a jitted function of the global batch."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.config import Config
from resnet_jax.data.batch import gather
from resnet_jax.data.transforms import augment_and_mix, mixed_targets
from resnet_jax.evaluation.metrics import batch_sums
from resnet_jax.training.losses import main_labels, training_loss
from resnet_jax.training.schedule import Schedule

_DROPOUT = 1
"""What dropout and stochastic depth fold into a step's key, to draw apart from the
augmentation."""

TrainStep = jax.stages.Wrapped
"""A jitted function of (TrainState, resident Batch or None, Batch) to TrainState."""


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    config: Config,
    mesh: Mesh,
) -> TrainStep:
    """A jitted function of (state, resident, batch) to the next state.

    It is written for the whole batch: the mean loss and, unless the model has batch
    normalisation groups, the batch statistics are global on any number of devices.
    The old state is donated: its buffers are gone after the call.

    The loss in the state's sums is the one minimised. Where images are mixed, its
    errors are those against the label of the larger part.

    Args:
      model: the net.
      optimizer: see ``make_optimizer``.
      schedule: of the learning rate.
      config: its sections ``augmentation``, ``loss`` and ``optimizer``.
      mesh: the devices.
    """

    def train_step(state, resident, batch):
        images, labels = gather(resident, batch)
        key = jax.random.fold_in(state.rng, state.step)
        images, share = augment_and_mix(
            key, images, state.statistics, config.augmentation
        )

        def loss_fn(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(key, _DROPOUT)},
            )
            targets = labels
            if share is not None:
                targets = mixed_targets(labels, share, logits.shape[-1])
            losses = training_loss(config.loss, logits, targets)
            sums = batch_sums(
                logits, main_labels(targets), losses, jnp.ones(labels.shape)
            )
            return losses.mean(), (sums, updates.get("batch_stats", {}))

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (sums, batch_stats)), gradients = grad_fn(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        rate = schedule.rate(state.schedule, state.step)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)

        step = state.step + 1
        newly_bad = (state.first_bad_step < 0) & ~jnp.isfinite(loss)
        return state.replace(
            step=step,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=_averaged(state.ema, params, batch_stats, step, config.optimizer),
            schedule=schedule.after_batch(state.schedule, sums.errors / sums.count),
            learning_rate=rate,
            sums=state.sums + sums,
            first_bad_step=jnp.where(newly_bad, step, state.first_bad_step),
        )

    same, cut = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    return jax.jit(
        train_step, in_shardings=(same, same, cut), out_shardings=same, donate_argnums=0
    )


def _averaged(ema, params, batch_stats, step, config):
    """The moving averages after so many steps."""
    if ema is None:
        return None
    new = {"params": params, "batch_stats": batch_stats}

    def average():
        return optax.incremental_update(new, ema, 1 - config.ema_decay)

    if config.ema_every_steps == 1:
        return average()
    return jax.lax.cond(step % config.ema_every_steps == 0, average, lambda: ema)
