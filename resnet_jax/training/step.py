"""One training step, as a jitted function of the global batch.

1. Gather the images of the batch; augment, normalise and mix them on the device.
2. Apply the net; compute the mean loss and its gradients, in one part or in
   micro-batches.
3. Update the parameters, their averages, the batch statistics and the metrics.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from resnet_jax import parallel
from resnet_jax.config import Config
from resnet_jax.data.batch import Batch, gather
from resnet_jax.data.transforms import augment_and_mix, mixed_targets
from resnet_jax.evaluation.metrics import batch_sums
from resnet_jax.models.conv import loop_algorithm
from resnet_jax.training.losses import main_labels, training_loss
from resnet_jax.training.state import Learner, TrainState

_DROPOUT = 1
"""Folded into a step's key for dropout and stochastic depth."""


def make_train_step(learner: Learner) -> jax.stages.Wrapped:
    """A jitted function of (state, resident, batch) to the next state.

    The step is written for the global batch: the mean loss and, without batch
    normalisation groups, the batch statistics are global on any number of devices. The
    old state is donated: its buffers are gone after the call.

    The state's sums hold the loss that is minimised. If images are mixed, errors are
    counted against the label of the larger part.

    Returns:
      A function of the ``TrainState``, ``Feed.resident`` and a ``Batch``.
    """
    return jitted(
        _step_function(learner), learner, parallel.batch_sharding(learner.mesh)
    )


def make_train_steps(learner: Learner) -> jax.stages.Wrapped:
    """A jitted function of (state, resident, indices) that runs many steps.

    Each row of the indices is the batch of one step, as in ``make_train_step``. Each
    number of rows compiles its own program.

    Returns:
      A function of the ``TrainState``, ``Feed.resident`` and int32 indices
      (steps, global batch).
    """
    step = _step_function(learner)

    def train_steps(state, resident, indices):
        def one(state, index):
            return step(state, resident, {"index": index}), None

        return lax.scan(one, state, indices)[0]

    return jitted(train_steps, learner, parallel.steps_sharding(learner.mesh))


def jitted(
    function: Callable[..., TrainState], learner: Learner, batch: NamedSharding
) -> jax.stages.Wrapped:
    """A step function (state, resident, batch), compiled for a learner's devices."""
    return jax.jit(
        function,
        in_shardings=(learner.shardings, parallel.replicated(learner.mesh), batch),
        out_shardings=learner.shardings,
        donate_argnums=0,
    )


def call_length(steps_left: int, most: int) -> int:
    """The largest power of two that exceeds neither ``steps_left`` nor ``most``.

    A stretch of steps cut like this needs few programs, and a run that stops after any
    call cuts the rest of the stretch into the same calls.
    """
    return 1 << (min(steps_left, most).bit_length() - 1)


def _step_function(
    learner: Learner,
) -> Callable[[TrainState, Batch | None, Batch], TrainState]:
    """The step itself, to be called inside jit."""
    config, mesh = learner.config, learner.mesh
    if config.training.micro_batches == 1:
        gradients_of = _of_examples(learner.model, config)
    else:
        gradients_of = _accumulated(learner, config.training.micro_batches)

    def train_step(state, resident, batch):
        # 1. The images, augmented with a key that depends on the step alone.
        images, labels = gather(resident, batch)
        key = jax.random.fold_in(state.rng, state.step)
        images, share = augment_and_mix(
            key, images, state.statistics, config.augmentation
        )
        targets = labels
        if share is not None:
            targets = mixed_targets(labels, share, learner.model.num_classes)

        # 2. The gradients of the mean loss.
        params = parallel.gathered(state.params, mesh)
        dropout_key = jax.random.fold_in(key, _DROPOUT)
        found = gradients_of(params, state.batch_stats, images, targets, dropout_key)

        # 3. The update.
        error = found.sums.errors / found.sums.count
        return updated(learner, state, found, error)

    return train_step


def updated(
    learner: Learner, state: TrainState, found: "Gradients", error: jax.Array
) -> TrainState:
    """The state after a step; ``error`` is the batch's, for the schedule.

    Each device updates its own part of parameters that are cut.
    """
    gradients = lax.with_sharding_constraint(found.gradients, learner.shardings.params)
    updates, opt_state = learner.optimizer.update(
        gradients, state.opt_state, state.params
    )
    rate = learner.schedule.rate(state.schedule, state.step)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    step, stats = state.step + 1, found.batch_stats
    newly_bad = (state.first_bad_step < 0) & ~jnp.isfinite(found.loss)
    return dataclasses.replace(
        state,
        step=step,
        params=params,
        batch_stats=stats,
        opt_state=opt_state,
        ema=_averaged(state.ema, params, stats, step, learner.config),
        schedule=learner.schedule.after_batch(state.schedule, error),
        learning_rate=rate,
        sums=state.sums + found.sums,
        first_bad_step=jnp.where(newly_bad, step, state.first_bad_step),
    )


@flax.struct.dataclass
class Gradients:
    """The result of one pass over a batch, or over a part of it.

    Attributes:
      loss: the mean over the examples.
      gradients: of that loss.
      sums: metrics.
      batch_stats: the next running statistics.
    """

    loss: jax.Array
    gradients: Any
    sums: Any
    batch_stats: Any


def _of_examples(model: nn.Module, config: Config) -> Callable[..., Gradients]:
    """A function of (params, batch_stats, images, targets, dropout key)."""

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
        return Gradients(loss, gradients, sums, new_stats)

    return of_examples


def _accumulated(learner: Learner, count: int) -> Callable[..., Gradients]:
    """As ``_of_examples``, but averages micro-batches that run one after another.

    The whole batch is augmented and mixed first. With batch normalisation groups a
    micro-batch holds whole groups, and the step is the same to rounding. With one
    group, each micro-batch has its own statistics, and holds the examples i with equal
    i mod ``count``. The running statistics move once, by the mean over all groups.
    Dropout and stochastic depth draw by the place in the micro-batch.
    """
    groups = learner.config.model.batch_norm_groups
    of_examples = _of_examples(_in_loop(learner.model, count), learner.config)

    def accumulated(params, batch_stats, images, targets, key):
        def of_part(part):
            index, images, targets = part
            part_key = jax.random.fold_in(key, index)
            found = of_examples(params, batch_stats, images, targets, part_key)
            # Sums of changes keep frozen statistics bit for bit.
            changes = jax.tree.map(jnp.subtract, found.batch_stats, batch_stats)
            return dataclasses.replace(found, batch_stats=changes)

        unit = len(images) // groups if groups > 1 else 1
        parts = micro_batches((images, targets), count, unit, learner.mesh)
        total = add_over_parts(of_part, (jnp.arange(count), *parts))
        new_stats = jax.tree.map(
            lambda old, change: old + change / count, batch_stats, total.batch_stats
        )
        return Gradients(
            loss=total.loss / count,
            gradients=jax.tree.map(lambda g: g / count, total.gradients),
            sums=total.sums,
            batch_stats=new_stats,
        )

    return accumulated


def micro_batches(batch: Any, count: int, unit: int, mesh: Mesh | AbstractMesh) -> Any:
    """Cuts a global batch into equal parts; inside jit.

    Consecutive examples form units, and unit u belongs to part u mod ``count``: the
    same examples on any number of devices. If ``count`` times the number of devices
    divides the number of units, nothing moves between devices.

    Args:
      batch: a tree of arrays (n, ...), cut over the devices along their first axis.
      count: parts; divides the number of units.
      unit: consecutive examples that stay together, such as a group of batch
        normalisation; divides n.
      mesh: the devices.

    Returns:
      A tree of arrays (count, n / count, ...), each part cut over the devices.
    """

    def cut(array: jax.Array) -> jax.Array:
        units = array.reshape(-1, count, unit, *array.shape[1:])
        parts = units.swapaxes(0, 1).reshape(count, -1, *array.shape[1:])
        return lax.with_sharding_constraint(parts, parallel.steps_sharding(mesh))

    return jax.tree.map(cut, batch)


def add_over_parts(function: Callable[[Any], Any], parts: Any) -> Any:
    """The sum of ``function`` over a tree of arrays (count, ...), part by part.

    It is a compiled loop, so one part is in memory at a time. (XLA:CPU keeps the maps
    of all parts of an unrolled loop, barriers or not.)
    """
    first = jax.tree.map(lambda array: array[0], parts)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first)
    )

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(part)), None

    return lax.scan(add, zeros, parts)[0]


def _in_loop(model: nn.Module, count: int) -> nn.Module:
    """The net for one of ``count`` micro-batches, inside a compiled loop.

    It has its share of the batch normalisation groups, and convolutions that suit a
    loop; see ``loop_algorithm``.
    """
    options: dict[str, Any] = {}
    groups = getattr(model, "batch_norm_groups", 1)
    if groups > 1:
        norm: Any = getattr(model, "norm", None)
        options["norm"] = functools.partial(norm, groups=groups // count)
    if hasattr(model, "conv_algorithm"):
        options["conv_algorithm"] = loop_algorithm(model.conv_algorithm)
    return model.clone(**options)


def _averaged(ema: Any, params: Any, batch_stats: Any, step: jax.Array, config: Config):
    """The moving averages after this step."""
    decay, every = config.optimizer.ema_decay, config.optimizer.ema_every_steps
    if ema is None or decay is None:
        return None
    new = {"params": params, "batch_stats": batch_stats}
    average = functools.partial(optax.incremental_update, new, ema, 1 - decay)
    if every == 1:
        return average()
    return lax.cond(step % every == 0, average, lambda: ema)
