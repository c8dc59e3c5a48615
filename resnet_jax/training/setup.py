"""All that training and evaluation of a config share, built once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from resnet_jax import parallel
from resnet_jax.config import Config, Derived, derive, model_options
from resnet_jax.data.dataset import Dataset, Split, open_dataset
from resnet_jax.data.feeds import Feed, is_resident, make_feed, training_order
from resnet_jax.data.order import Order
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluator import EvalStep, make_eval_step
from resnet_jax.models import create_model
from resnet_jax.training.optimizer import make_optimizer
from resnet_jax.training.schedule import Schedule
from resnet_jax.training.state import TrainState, init_state, state_shardings
from resnet_jax.training.step import (
    TrainStep,
    TrainSteps,
    make_train_step,
    make_train_steps,
)

STEPS_PER_CALL = 128
"""On accelerators, where the config does not say."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run; see ``prepare``."""

    config: Config
    dataset: Dataset
    derived: Derived
    mesh: Mesh
    model: nn.Module
    optimizer: optax.GradientTransformation
    schedule: Schedule

    @property
    def evaluation_batch_size(self) -> int:
        """Examples an evaluation batch, rounded up to divide over the devices."""
        training = self.config.training
        size = (
            self.config.evaluation.batch_size
            or training.global_batch_size // training.micro_batches
        )
        return -(-size // self.mesh.size) * self.mesh.size

    def feed(self, split: Split) -> Feed:
        """Batches of a split on the devices."""
        return make_feed(split, self.mesh, self.config.data, self.config.augmentation)

    def train_step(self) -> TrainStep:
        """The jitted training step."""
        return make_train_step(
            self.model,
            self.optimizer,
            self.schedule,
            self.config,
            self.mesh,
            self._shardings(),
        )

    def train_steps(self, length: int) -> TrainSteps:
        """So many training steps on the resident data set as one jitted function."""
        return make_train_steps(
            self.model,
            self.optimizer,
            self.schedule,
            self.config,
            self.mesh,
            self._shardings(),
            self.order(),
            length,
        )

    def order(self) -> Order:
        """The order of the training examples."""
        config = self.config
        return training_order(
            len(self.dataset.train),
            config.seed,
            config.training.global_batch_size,
            config.data,
            config.augmentation,
        )

    @property
    def steps_per_call(self) -> int:
        """The most steps of one call: the config's, or what suits data and devices.

        Raises:
          UserError: the config asks for several, and the data are streamed.
        """
        config = self.config
        asked = config.training.steps_per_call
        resident = is_resident(self.dataset.train, config.data, config.augmentation)
        if not resident and asked is not None and asked > 1:
            raise UserError(
                f"training.steps_per_call={asked} needs the training data on the "
                "devices, and they are streamed: set it to 1, or data.resident to true"
            )
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return asked or (STEPS_PER_CALL if resident and not on_cpu else 1)

    def eval_step(self) -> EvalStep:
        """The jitted evaluation step."""
        return make_eval_step(self.model, self.mesh)

    def fresh_state(self) -> TrainState:
        """The state before the first step, on the devices.

        Raises:
          UserError: model.weights are not those of this net.
        """
        shardings = self._shardings()
        init = jax.jit(self._init, out_shardings=shardings)
        state = init(self.dataset.train.statistics())
        if self.config.model.weights is None:
            return state
        # Imported here: only runs that start from weights need their libraries.
        from resnet_jax.weights import load_weights

        loaded = load_weights(
            self.config.model.weights,
            self.model,
            new_head=self.config.model.new_head,
            rng=jax.random.key(self.config.seed),
        )
        variables = jax.device_get({"batch_stats": {}} | loaded)
        kept = {name: getattr(shardings, name) for name in variables}
        # Placed twice: the step donates the state, and no buffer may be in it twice.
        averaged = None
        if state.ema is not None:
            averaged = parallel.place_whole(variables, shardings.ema)
        return state.replace(**parallel.place_whole(variables, kept), ema=averaged)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; computes nothing."""
        state = self._shapes()
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            state,
            self._shardings(),
        )

    def _shapes(self) -> TrainState:
        shape = self.dataset.train.statistics_shape()
        pixels: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.eval_shape(self._init, PixelStatistics(mean=pixels, std=pixels))

    def _shardings(self) -> TrainState:
        cut = self.config.parallel.fully_sharded
        return state_shardings(self._shapes(), self.mesh, cut)

    def _init(self, statistics: PixelStatistics) -> TrainState:
        return init_state(
            self.model,
            self.optimizer,
            self.schedule,
            statistics,
            image_shape=self.dataset.image_shape,
            seed=self.config.seed,
            averaged=self.config.optimizer.ema_decay is not None,
        )


def prepare(
    config: Config, mesh: Mesh | None = None, dataset: Dataset | None = None
) -> Setup:
    """Opens the data and builds the net, optimizer and schedule of a config.

    Args:
      config: of the run.
      mesh: the devices; all of them by default.
      dataset: the data, where they are open already.

    Raises:
      UserError: the data are missing, the batch does not divide over the devices, or
        training.steps_per_call does not suit the data.
    """
    dataset = dataset or open_dataset(config)
    mesh = mesh or parallel.data_mesh()
    parallel.check_processes(mesh)
    parallel.check_divides(
        config.training.global_batch_size,
        mesh.size,
        config.training.micro_batches,
        config.model.batch_norm_groups,
    )
    derived = derive(config, len(dataset.train))
    model = create_model(
        config.model.name,
        num_classes=dataset.num_classes,
        dtype=jnp.dtype(config.model.dtype),
        **model_options(config.model),
    )
    if config.model.frozen and hasattr(model, "batch_norm_frozen"):
        model = model.clone(batch_norm_frozen=config.model.frozen)
    setup = Setup(
        config=config,
        dataset=dataset,
        derived=derived,
        mesh=mesh,
        model=model,
        optimizer=make_optimizer(config.optimizer, config.model.frozen),
        schedule=Schedule(config.optimizer, config.schedule, derived),
    )
    _ = setup.steps_per_call
    return setup
