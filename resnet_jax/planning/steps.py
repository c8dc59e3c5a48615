"""The training step of one device, traced and not run."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from resnet_jax import parallel
from resnet_jax.analysis.complexity import own_multiply_adds
from resnet_jax.config import Config
from resnet_jax.data.batch import Batch
from resnet_jax.data.dataset import Dataset
from resnet_jax.data.feeds import is_resident
from resnet_jax.planning.memory import ACCELERATOR, XLA_CPU, Compiler, Memory
from resnet_jax.planning.program import Operation, Program, flatten_program
from resnet_jax.training.setup import Setup, prepare
from resnet_jax.training.state import TrainState, state_shardings


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """One device's part of a training step.

    Attributes:
      setup: of one device and its part of the batch.
      traced: ``jax.stages.Traced`` of the real training step.
      state, resident, batch: abstract arguments of the step.
      held: the state as it lies on the devices of the run, cut or whole.
      memory: the step's arrays.
    """

    setup: Setup
    traced: Any
    state: TrainState
    resident: Batch | None
    batch: Batch
    held: TrainState
    memory: Memory

    def multiply_adds(self) -> int:
        """Those of all convolutions and matrix products of the step.

        Zeros that the gradient of a strided convolution puts between pixels do not
        count.
        """
        return _multiply_adds(self.memory.program)

    def gradient_bytes(self) -> int:
        """What devices have to add up: the trainable parameters, float32."""
        return tree_bytes(self.state.params)

    def gathered_bytes(self) -> int:
        """Parameters that are cut over the devices, and whole inside the step."""
        return tree_bytes(self.state.params) - tree_bytes(self.held.params)


def trace_step(
    config: Config,
    dataset: Dataset,
    devices: int = 1,
    compiler: Compiler = ACCELERATOR,
) -> TracedStep:
    """Traces the training step for one of so many devices.

    The program is written for the global batch; here it is traced for one device and
    its part, without the exchange between devices.

    Args:
      config: of the run.
      dataset: sizes and shapes are read from it.
      devices: over which the batch is cut.
      compiler: which one's arrays to choose; with XLA_CPU the convolutions too are
        those of the CPU.

    Raises:
      UserError: the batch does not divide over the devices.
    """
    parallel.check_divides(
        config.training.global_batch_size,
        devices,
        config.training.micro_batches,
        config.model.batch_norm_groups,
    )
    mesh = parallel.data_mesh(1)
    setup = prepare(_share(config, devices), mesh, dataset)
    model = setup.model
    automatic = getattr(model, "conv_algorithm", None) == "auto"
    if automatic and compiler is not XLA_CPU:
        setup = dataclasses.replace(setup, model=model.clone(conv_algorithm="xla"))
    state = setup.abstract_state()
    resident, batch = _arguments(setup)
    traced = setup.train_step().trace(state, resident, batch)
    program = flatten_program(traced.jaxpr, compiler.keeps_barriers)
    return TracedStep(
        setup=setup,
        traced=traced,
        state=state,
        resident=resident,
        batch=batch,
        held=_held(state, devices, config.parallel.fully_sharded),
        memory=Memory(program, compiler),
    )


def _held(state: TrainState, devices: int, cut: bool) -> TrainState:
    """The abstract state on so many devices, none of which need be here."""
    mesh = AbstractMesh((devices,), ("data",))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        state,
        state_shardings(state, mesh, cut),
    )


def resident_bytes(config: Config, dataset: Dataset) -> int:
    """Size of the splits that lie on every device whole, labels included."""
    splits = [dataset.train, dataset.test]
    splits += [dataset.holdout] if dataset.holdout else []
    return sum(
        split.nbytes + 4 * len(split)
        for split in splits
        if is_resident(split, config.data, config.augmentation)
    )


def tree_bytes(tree: Any) -> int:
    """Size of a tree of abstract arrays on one device.

    An array that is cut over devices counts with the device's part.
    """
    return sum(map(_leaf_bytes, jax.tree.leaves(tree)))


def _leaf_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _share(config: Config, devices: int) -> Config:
    """The config of one device's part of the batch.

    Its groups of batch statistics are the device's own; statistics that span devices
    are taken over the device's part.
    """
    training = dataclasses.replace(
        config.training,
        global_batch_size=config.training.global_batch_size // devices,
    )
    groups = max(1, config.model.batch_norm_groups // devices)
    if training.global_batch_size % groups:
        groups = 1
    model = dataclasses.replace(config.model, batch_norm_groups=groups)
    return dataclasses.replace(config, training=training, model=model)


def _arguments(setup: Setup) -> tuple[Batch | None, Batch]:
    """The abstract resident data and batch of a step."""
    train, config = setup.dataset.train, setup.config
    same = parallel.replicated(setup.mesh)
    cut = parallel.batch_sharding(setup.mesh)
    count = config.training.global_batch_size

    def array(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if is_resident(train, config.data, config.augmentation):
        resident = {
            "image": array((len(train), *train.image_shape), jnp.uint8, same),
            "label": array((len(train),), jnp.int32, same),
        }
        return resident, {"index": array((count,), jnp.int32, cut)}
    return None, {
        "image": array((count, *train.training_shape), jnp.uint8, cut),
        "label": array((count,), jnp.int32, cut),
    }


def _multiply_adds(program: Program) -> int:
    """Those of a program; of branches the dearest counts."""
    total = 0
    for operation in program.operations:
        inner = [_multiply_adds(body) for body in operation.inner]
        total += operation_multiply_adds(operation)
        total += operation.length * max(inner, default=0)
    return total


def operation_multiply_adds(operation: Operation) -> int:
    """Those of a convolution or a product, without what it runs inside.

    Zeros that the gradient of a strided convolution puts between pixels do not count.
    """
    count = own_multiply_adds(operation.equation)
    if operation.name != "conv_general_dilated":
        return count
    return count // math.prod(operation.equation.params["lhs_dilation"])
