"""A run's parts, for tests that look inside."""

import dataclasses
import functools

import jax
import numpy as np
import orbax.checkpoint as ocp

from resnet_jax import parallel
from resnet_jax.checkpoints import Checkpoints
from resnet_jax.config import resolve
from resnet_jax.data.dataset import Dataset, open_dataset
from resnet_jax.data.feeds import make_feed
from resnet_jax.training.state import Learner
from resnet_jax.training.step import make_train_step
from resnet_jax.training.train import learner_for


@dataclasses.dataclass(frozen=True)
class Parts:
    """The learner of a config and its open data."""

    learner: Learner
    dataset: Dataset

    @property
    def config(self):
        return self.learner.config

    @functools.cached_property
    def feed(self):
        """Of the training set."""
        return self.feed_of(self.dataset.train)

    def feed_of(self, split):
        config = self.learner.config
        return make_feed(split, self.learner.mesh, config.data, config.augmentation)

    @functools.cached_property
    def train_step(self):
        return make_train_step(self.learner)

    def fresh_state(self, variables=None):
        return self.learner.fresh_state(self.dataset.train.statistics(), variables)

    def batches(self, position=0):
        config = self.learner.config
        return self.feed.training_batches(
            position, config.training.global_batch_size, config.seed
        )

    def run(self, steps, state=None):
        """The state after some steps, from a fresh one by default."""
        state = self.fresh_state() if state is None else state
        for _, batch in zip(range(steps), self.batches()):
            state = self.train_step(state, self.feed.resident, batch)
        return state


def parts(config, devices=None):
    """The parts of a config, on all devices by default."""
    config = resolve(config)
    mesh = parallel.data_mesh(devices)
    dataset = open_dataset(config)
    return Parts(learner_for(config, dataset, mesh), dataset)


def final_state(config, workdir):
    """The state and content of a run's last checkpoint."""
    learner = parts(config).learner
    with Checkpoints(workdir / "checkpoints", learner.config.checkpoint) as checkpoints:
        return checkpoints.restore(checkpoints.steps()[-1], learner.abstract_state())


def host(state):
    """Parameters and batch statistics on the host."""
    return jax.device_get({"params": state.params, "batch_stats": state.batch_stats})


def plain_arrays(folder):
    """A state as NumPy arrays, by Orbax alone, as docs/weights.md shows."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, ocp.args.PyTreeRestore(restore_args=numpy))
