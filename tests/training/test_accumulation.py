"""A step in micro-batches against the same step at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import parallel
from resnet_jax.config import resolve
from resnet_jax.data.transforms import normalize, to_unit
from resnet_jax.errors import UserError
from resnet_jax.training.benchmark import abstract_batch, synthetic_learner
from resnet_jax.training.step import add_over_parts, make_train_step, micro_batches
from tests.training.helpers import parts
from tests.training.test_step import assert_alike, run, use_modern_options

COLLECTIVES = ("all-to-all", "all-gather", "collective-permute", "all-reduce")


def cut(examples, count, unit, mesh):
    step = jax.jit(
        lambda x: micro_batches(x, count, unit, mesh),
        in_shardings=parallel.batch_sharding(mesh),
    )
    return step.lower(examples).compile()


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_the_parts_are_the_same_on_any_number_of_devices(num_devices):
    examples = np.arange(64 * 3).reshape(64, 3)
    mesh = parallel.data_mesh(num_devices)
    placed = parallel.place(examples, parallel.batch_sharding(mesh))
    single = cut(placed, 4, 1, mesh)(placed)
    np.testing.assert_array_equal(single, [examples[part::4] for part in range(4)])
    grouped = cut(placed, 2, 8, mesh)(placed)
    expected = [examples.reshape(8, 8, 3)[part::2].reshape(32, 3) for part in (0, 1)]
    np.testing.assert_array_equal(grouped, expected)


@pytest.mark.parametrize(
    ("count", "unit", "moves"), [(4, 1, False), (2, 4, False), (2, 8, True)]
)
def test_examples_move_between_devices_only_where_groups_make_them(count, unit, moves):
    """By the compiled program: 64 examples on 8 devices, 8 on each."""
    program = cut(np.zeros((64, 3)), count, unit, parallel.data_mesh(8)).as_text()
    assert any(name in program for name in COLLECTIVES) == moves


def test_parts_are_added_up():
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(5, 4, 3)).astype(np.float32)
    found = jax.jit(lambda p: add_over_parts(lambda x: {"sum": x.sum(0)}, p))(parts)
    np.testing.assert_allclose(found["sum"], parts.sum((0, 1)), rtol=1e-5, atol=1e-6)


def assert_close(a, b, atol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=atol)


def test_ghost_statistics_make_it_the_same_step(tiny_config):
    """Augmentation, pairs to mix, groups, running statistics: all as at once."""
    use_modern_options(tiny_config)
    tiny_config.optimizer.kind = "sgd"
    tiny_config.augmentation.flip = True
    tiny_config.model.batch_norm_groups = 4
    tiny_config.optimizer.learning_rate = 0.005
    whole = run(tiny_config, 1, 4)
    for micro, num_devices in ((2, 1), (4, 8)):
        tiny_config.training.micro_batches = micro
        in_parts = run(tiny_config, num_devices, 4)
        assert_alike(tiny_config, in_parts, whole, 0.01)
        assert int(in_parts[0].sums.count) == int(whole[0].sums.count)


def test_with_global_statistics_each_part_has_its_own(tiny_config):
    """A step with stochastic depth by plain jax.grad of each part, mean of four."""
    tiny_config.augmentation.pad = 0
    tiny_config.model.stochastic_depth_rate = 0.5
    tiny_config.optimizer.weight_decay = 0.0
    tiny_config.training.micro_batches = 4
    setup = parts(tiny_config, 8)
    feed = setup.feed
    state = setup.fresh_state()
    batch = next(iter(feed.training_batches(0, 32, 0)))
    chosen = np.asarray(batch["index"])
    images = normalize(to_unit(feed.resident["image"][chosen]), state.statistics)
    images, labels = np.asarray(images), np.asarray(feed.resident["label"])[chosen]
    params = jax.tree.map(np.asarray, state.params)
    stats = jax.tree.map(np.asarray, state.batch_stats)
    key = jax.random.fold_in(jax.random.fold_in(state.rng, 0), 1)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_of(params, images, labels, key):
        logits, updates = setup.learner.model.apply(
            {"params": params, "batch_stats": stats},
            images,
            True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        picked = jax.nn.log_softmax(logits)[jnp.arange(8), labels]
        return -picked.mean(), updates["batch_stats"]

    gradients, new_stats = [], []
    for part in range(4):
        part_key = jax.random.fold_in(key, part)
        gradient, updated = gradient_of(
            params, images[part::4], labels[part::4], part_key
        )
        gradients.append(gradient)
        new_stats.append(updated)

    state = setup.train_step(state, feed.resident, batch)
    rate = float(state.learning_rate)
    expected = jax.tree.map(
        lambda p, *parts: p - rate * np.mean(parts, axis=0), params, *gradients
    )
    assert_close(state.params, expected, 1e-5)
    means = jax.tree.map(lambda *parts: np.mean(parts, axis=0), *new_stats)
    assert_close(state.batch_stats, means, 1e-5)


def test_frozen_parts_keep_their_bits_in_three_parts(tiny_config):
    tiny_config.model.frozen = ("stem", "stage1")
    tiny_config.training.global_batch_size = 24
    setup = parts(tiny_config, 1)
    rng = np.random.default_rng(0)
    state = setup.fresh_state()
    frozen = jax.tree.map(
        lambda leaf: rng.uniform(1, 2, leaf.shape).astype(np.float32),
        state.batch_stats["stem"],
    )
    state = state.replace(batch_stats=state.batch_stats | {"stem": frozen})
    old = jax.tree.map(np.asarray, (state.params["stem"], state.batch_stats["stem"]))
    tiny_config.training.micro_batches = 3
    setup = parts(tiny_config, 1)
    feed, train_step = setup.feed, setup.train_step
    for _, batch in zip(range(3), feed.training_batches(0, 24, 0)):
        state = train_step(state, feed.resident, batch)
    new = (state.params["stem"], state.batch_stats["stem"])
    jax.tree.map(np.testing.assert_array_equal, old, new)


def test_memory_falls_with_the_micro_batches():
    """By the compiler's own account of what a step needs beside its arguments."""

    def temporary_bytes(count):
        learner = synthetic_learner("cifar_resnet8", 256, micro_batches=count)
        step, state = make_train_step(learner), learner.abstract_state()
        lowered = step.lower(state, None, abstract_batch(learner))
        memory = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert temporary_bytes(4) < 0.6 * temporary_bytes(1)


def test_a_batch_that_does_not_divide_into_the_parts_is_refused(tiny_config):
    tiny_config.training.micro_batches = 8
    with pytest.raises(
        UserError, match=r"32 does not divide over training.micro_batches=8 .* is 64"
    ):
        parts(tiny_config, 8)


def test_groups_that_a_micro_batch_would_cut_are_refused(tiny_config):
    tiny_config.model.batch_norm_groups = 8
    tiny_config.training.micro_batches = 3
    with pytest.raises(UserError, match=r"holds whole groups: choose from 1, 2, 4, 8"):
        resolve(tiny_config)
