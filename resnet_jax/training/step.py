"""One optimizer step as a jitted function of the global batch."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.config.schema import AugmentationConfig
from resnet_jax.data.batch import gather
from resnet_jax.data.transforms import augment
from resnet_jax.evaluation.metrics import batch_sums, cross_entropy
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
    augmentation: AugmentationConfig,
    ema_decay: float | None,
    mesh: Mesh,
) -> TrainStep:
    """A jitted function of (state, resident, batch) to the next state.

    It is written for the whole batch: the mean loss and, unless the model has batch
    normalisation groups, the batch statistics are global on any number of devices.
    The old state is donated: its buffers are gone after the call.
    """

    def train_step(state, resident, batch):
        images, labels = gather(resident, batch)
        key = jax.random.fold_in(state.rng, state.step)
        images = augment(key, images, state.statistics, augmentation)

        def loss_fn(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(key, _DROPOUT)},
            )
            losses = cross_entropy(logits, labels)
            return losses.mean(), (logits, losses, updates.get("batch_stats", {}))

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, losses, batch_stats)), gradients = grad_fn(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        rate = schedule.rate(state.schedule, state.step)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)

        sums = batch_sums(logits, labels, losses, jnp.ones(labels.shape))
        step = state.step + 1
        newly_bad = (state.first_bad_step < 0) & ~jnp.isfinite(loss)
        return state.replace(
            step=step,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=_averaged(state.ema, params, batch_stats, ema_decay),
            schedule=schedule.after_batch(state.schedule, sums.errors / sums.count),
            learning_rate=rate,
            sums=state.sums + sums,
            first_bad_step=jnp.where(newly_bad, step, state.first_bad_step),
        )

    same, cut = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    return jax.jit(
        train_step, in_shardings=(same, same, cut), out_shardings=same, donate_argnums=0
    )


def _averaged(ema, params, batch_stats, decay):
    if ema is None:
        return None
    new = {"params": params, "batch_stats": batch_stats}
    return optax.incremental_update(new, ema, 1 - decay)
