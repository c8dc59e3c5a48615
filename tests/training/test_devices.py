"""One run on one device, on eight, and with the state cut over the eight."""

import jax
import pytest
from jax.sharding import PartitionSpec

import resnet_jax
from resnet_jax import parallel
from resnet_jax.checkpoints import Checkpoints
from resnet_jax.config import resolve
from resnet_jax.config.schema import CheckpointConfig
from resnet_jax.workdir import Workdir
from tests.test_checkpoints import same
from tests.training.helpers import parts
from tests.training.test_step import assert_alike, run

STEPS = 8


@pytest.fixture
def config(tiny_config):
    """With momentum, decay, augmentation and a rate at which rounding stays small."""
    tiny_config.augmentation.flip = True
    tiny_config.optimizer.learning_rate = 0.005
    tiny_config.optimizer.ema_decay = 0.9
    tiny_config.training.steps = STEPS
    return tiny_config


@pytest.mark.parametrize("groups", [1, 4])
def test_eight_devices_train_as_one_does(config, groups):
    """With statistics of the whole batch, and of ghost batches of eight."""
    config.model.batch_norm_groups = groups
    assert_alike(config, run(config, 8, STEPS), run(config, 1, STEPS))


@pytest.mark.parametrize(
    ("kind", "micro_batches", "steps"), [("sgd", 1, STEPS), ("lamb", 2, 4)]
)
def test_a_state_cut_over_the_devices_trains_alike(config, kind, micro_batches, steps):
    """Norms too are those of whole parameters: of all gradients, and LAMB's of each."""
    config.optimizer.kind = kind
    config.optimizer.max_grad_norm = 1.0
    config.training.micro_batches = micro_batches
    replicated = run(config, 8, steps)
    config.parallel.fully_sharded = True
    state, losses = run(config, 8, steps)
    assert_alike(config, (state, losses), replicated)
    for tree in (state.params, state.opt_state, state.ema):
        spread = {
            leaf.addressable_shards[0].data.size / leaf.size
            for leaf in jax.tree.leaves(tree)
            if leaf.size >= parallel.SMALL_LEAF
        }
        assert spread == {1 / 8}


def test_a_cut_state_begins_with_the_same_bits(config):
    replicated = parts(config).fresh_state()
    config.parallel.fully_sharded = True
    same(parts(config).fresh_state(), replicated)


def test_a_step_takes_and_leaves_less_on_each_device(config):
    """By the compiler's account: all but the small leaves and the data is an eighth."""

    def arguments(cut):
        config.parallel.fully_sharded = cut
        setup = parts(config)
        feed = setup.feed
        batch = next(iter(feed.training_batches(0, 32, 0)))
        lowered = setup.train_step.lower(
            setup.learner.abstract_state(), feed.resident, batch
        )
        return lowered.compile().memory_analysis().argument_size_in_bytes

    sizes = [
        leaf.size
        for leaf in jax.tree.leaves(parts(config).learner.abstract_state().params)
    ]
    large = sum(size for size in sizes if size >= parallel.SMALL_LEAF)
    # Parameters, velocity and averages, of four bytes a number.
    assert arguments(False) - arguments(True) == 3 * 4 * large * 7 // 8


def test_checkpoints_go_from_replicated_to_cut_and_back(config, tmp_path):
    state, _ = run(config, 8, 2)
    layouts = {}
    for cut in (False, True):
        config.parallel.fully_sharded = cut
        layouts[cut] = parts(config).learner.abstract_state()
    moved = state
    for step, cut in enumerate((True, False), start=2):
        with Checkpoints(tmp_path / str(step), CheckpointConfig()) as checkpoints:
            checkpoints.save(moved, {}, None)
            checkpoints.wait()
            moved, _ = checkpoints.restore(2, layouts[cut])
        same(moved, state)
        specs = {leaf.sharding.spec for leaf in jax.tree.leaves(moved.params)}
        assert (specs == {PartitionSpec()}) == (not cut)


def test_a_whole_run_with_its_state_cut(config, tmp_path, console):
    """Training, evaluation and checkpoints; the workdir takes the other layout too."""
    config.training.steps = 4
    config.evaluation.every_steps = config.checkpoint.every_steps = 2
    config.parallel.fully_sharded = True
    result = resnet_jax.train(config, tmp_path / "run", console)
    precise = resnet_jax.evaluate(tmp_path / "run", precise_batches=2, console=console)
    assert precise["count"] == result["test_count"]
    config.parallel.fully_sharded = False
    Workdir(tmp_path / "run").admit(resolve(config))
