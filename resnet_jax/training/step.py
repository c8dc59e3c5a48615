"""One optimizer step as a jitted function of the global batch."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from resnet_jax import parallel
from resnet_jax.config import Config
from resnet_jax.data import device_order
from resnet_jax.data.batch import Batch, gather
from resnet_jax.data.order import Order
from resnet_jax.data.transforms import augment_and_mix, mixed_targets
from resnet_jax.evaluation.metrics import Sums, batch_sums
from resnet_jax.training.accumulation import add_over_parts, in_loop, micro_batches
from resnet_jax.training.losses import main_labels, training_loss
from resnet_jax.training.schedule import Schedule
from resnet_jax.training.state import TrainState

_DROPOUT = 1
"""What dropout and stochastic depth fold into a step's key, to draw apart from the
augmentation."""

TrainStep = jax.stages.Wrapped
"""A jitted function of (TrainState, resident Batch or None, Batch) to TrainState."""

TrainSteps = jax.stages.Wrapped
"""A jitted function of (TrainState, resident Batch, Place) to TrainState."""


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    config: Config,
    mesh: Mesh,
    shardings: TrainState | None = None,
) -> TrainStep:
    """A jitted function of (state, resident, batch) to the next state.

    It is written for the whole batch: the mean loss and, unless the model has batch
    normalisation groups, the batch statistics are global on any number of devices.
    The old state is donated: its buffers are gone after the call.

    The loss in the state's sums is the one minimised. Where images are mixed, its
    errors are those against the label of the larger part.

    With micro-batches the step is the same to rounding where batch normalisation has
    groups: images are augmented and mixed as a whole batch first, a micro-batch holds
    whole groups, and the running statistics move once, by the mean over all groups.
    Where it has one group, each micro-batch has statistics of its own: those of
    examples i of equal i mod ``training.micro_batches``. Dropout and stochastic depth
    draw by the place in the micro-batch.

    Args:
      model: the net.
      optimizer: see ``make_optimizer``.
      schedule: of the learning rate.
      config: its sections ``augmentation``, ``loss``, ``optimizer`` and ``training``.
      mesh: the devices.
      shardings: of the state, see ``state_shardings``; replicated by default.
    """
    step = _step_function(model, optimizer, schedule, config, mesh, shardings)
    return _jitted(step, mesh, shardings, parallel.batch_sharding(mesh))


def make_train_steps(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    config: Config,
    mesh: Mesh,
    shardings: TrainState | None,
    order: Order,
    length: int,
) -> TrainSteps:
    """A jitted function of (state, resident, place) to the state ``length`` steps on.

    Each step is that of ``make_train_step``; the indices of its batches are computed
    before the first, from the seed and the place in the order. The seed is an argument
    of the program, and ``order.seed`` is not looked at.

    Args:
      model: the net.
      optimizer: see ``make_optimizer``.
      schedule: of the learning rate.
      config: the sections that ``make_train_step`` reads.
      mesh: the devices.
      shardings: of the state; None: replicated.
      order: of the resident examples.
      length: steps a call.
    """
    step = _step_function(model, optimizer, schedule, config, mesh, shardings)
    size = config.training.global_batch_size
    cut = NamedSharding(mesh, PartitionSpec(None, "data"))

    def train_steps(state, resident, place):
        indices = device_order.examples(
            place, length * size, order.num_examples, order.epoch_length, order.repeats
        )
        # Every device has the whole order, and then its part of each batch.
        indices = parallel.gathered(indices, mesh).reshape(length, size)
        indices = lax.with_sharding_constraint(indices, cut)

        def one(state, index):
            return step(state, resident, {"index": index}), None

        return lax.scan(one, state, indices)[0]

    return _jitted(train_steps, mesh, shardings, parallel.replicated(mesh))


def _jitted(
    function: Callable[..., TrainState],
    mesh: Mesh,
    shardings: TrainState | None,
    inputs: NamedSharding,
) -> jax.stages.Wrapped:
    """With the old state donated, and its layout kept."""
    same = parallel.replicated(mesh)
    state = same if shardings is None else shardings
    return jax.jit(
        function,
        in_shardings=(state, same, inputs),
        out_shardings=state,
        donate_argnums=0,
    )


def _step_function(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    config: Config,
    mesh: Mesh,
    shardings: TrainState | None,
) -> Callable[[TrainState, Batch | None, Batch], TrainState]:
    """The step itself, to be called inside jit; see ``make_train_step``."""
    gradients_of = _gradients_of(model, config, mesh)

    def train_step(state, resident, batch):
        images, labels = gather(resident, batch)
        key = jax.random.fold_in(state.rng, state.step)
        images, share = augment_and_mix(
            key, images, state.statistics, config.augmentation
        )
        targets = labels
        if share is not None:
            targets = mixed_targets(labels, share, model.num_classes)
        found = gradients_of(
            parallel.gathered(state.params, mesh),
            state.batch_stats,
            images,
            targets,
            jax.random.fold_in(key, _DROPOUT),
        )
        gradients = found.gradients
        if shardings is not None:
            # Each device updates its own part of what is cut.
            gradients = lax.with_sharding_constraint(gradients, shardings.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        rate = schedule.rate(state.schedule, state.step)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)

        step = state.step + 1
        sums, batch_stats = found.sums, found.batch_stats
        newly_bad = (state.first_bad_step < 0) & ~jnp.isfinite(found.loss)
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

    return train_step


@flax.struct.dataclass
class _Found:
    """What the examples of a batch, or of a part of it, say.

    Attributes:
      loss: the mean over the examples.
      gradients: of that loss.
      sums: metrics.
      batch_stats: the next running statistics.
    """

    loss: jax.Array
    gradients: Any
    sums: Sums
    batch_stats: Any


def _gradients_of(
    model: nn.Module, config: Config, mesh: Mesh
) -> Callable[[Any, Any, jax.Array, jax.Array, jax.Array], _Found]:
    """A function of (params, batch_stats, images, targets, dropout key) to _Found."""
    count = config.training.micro_batches
    groups = getattr(model, "batch_norm_groups", 1)
    if count > 1:
        model = in_loop(model, count)

    def of_examples(params, batch_stats, images, targets, key):
        def loss_fn(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            losses = training_loss(config.loss, logits, targets)
            labels = main_labels(targets)
            sums = batch_sums(logits, labels, losses, jnp.ones(labels.shape))
            return losses.mean(), (sums, updates.get("batch_stats", {}))

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (sums, new_stats)), gradients = grad_fn(params)
        return _Found(loss, gradients, sums, new_stats)

    def accumulated(params, batch_stats, images, targets, key):
        def of_part(part):
            index, images, targets = part
            part_key = jax.random.fold_in(key, index)
            found = of_examples(params, batch_stats, images, targets, part_key)
            # As changes: the mean of equal numbers, frozen ones, may be another.
            changes = jax.tree.map(jnp.subtract, found.batch_stats, batch_stats)
            return found.replace(batch_stats=changes)

        unit = len(images) // groups if groups > 1 else 1
        cut = micro_batches((images, targets), count, unit, mesh)
        total = add_over_parts(of_part, (jnp.arange(count), *cut))
        mean = jax.tree.map(
            lambda leaf: leaf / count, total.replace(sums=None, batch_stats={})
        )
        new_stats = jax.tree.map(
            lambda old, change: old + change / count, batch_stats, total.batch_stats
        )
        return mean.replace(sums=total.sums, batch_stats=new_stats)

    return of_examples if count == 1 else accumulated


def _averaged(ema, params, batch_stats, step, config):
    """The moving averages after so many steps."""
    if ema is None:
        return None
    new = {"params": params, "batch_stats": batch_stats}

    def average():
        return optax.incremental_update(new, ema, 1 - config.ema_decay)

    if config.ema_every_steps == 1:
        return average()
    return lax.cond(step % config.ema_every_steps == 0, average, lambda: ema)
