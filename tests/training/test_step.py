import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.data.batch import gather
from resnet_jax.data.transforms import augment_and_mix, normalize, to_unit
from resnet_jax.errors import UserError
from resnet_jax.evaluation.metrics import batch_sums, cross_entropy
from tests.training.helpers import parts


def run(config, num_devices, steps):
    """The last state and the losses."""
    setup, losses = parts(config, num_devices), []
    state = setup.fresh_state()
    for _, batch in zip(range(steps), setup.batches()):
        before = float(state.sums.loss)
        state = setup.train_step(state, setup.feed.resident, batch)
        losses.append(float(state.sums.loss) - before)
    return state, np.array(losses)


def assert_alike(config, found, expected, tolerance=0.1):
    """Two results of ``run`` agree, but for what rounding grows to in a few steps.

    Where rounding flips a ReLU, gradients differ by more than rounding. After 20 steps
    the parameters differed by 2 % of their distance from the start, and the losses by
    3e-4. With statistics of each device's own examples it is 55 % and 2e-2.
    """
    start = parts(config, 1).fresh_state()
    np.testing.assert_allclose(found[1], expected[1], rtol=2e-3)
    for name in ("params", "batch_stats"):
        first, a, b = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
            for tree in (getattr(s, name) for s in (start, found[0], expected[0]))
        )
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b - first)


def use_modern_options(config):
    """What the recipes of 2021 have: mixing, binary losses, LAMB, averages."""
    config.augmentation.mixup_alpha = 0.2
    config.augmentation.cutmix_alpha = 1.0
    config.loss.kind = "sigmoid"
    config.loss.target_threshold = 0.2
    config.loss.label_smoothing = 0.1
    config.optimizer.kind = "lamb"
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay_scope = "kernels"
    config.optimizer.max_grad_norm = 1.0
    config.optimizer.ema_decay = 0.5
    config.optimizer.ema_every_steps = 2


def test_modern_options_train_alike_on_eight_devices(tiny_config):
    use_modern_options(tiny_config)
    one, losses_of_one = run(tiny_config, 1, 4)
    eight, losses_of_eight = run(tiny_config, 8, 4)
    np.testing.assert_allclose(losses_of_eight, losses_of_one, rtol=1e-3)
    for a, b in zip(jax.tree.leaves(one.ema), jax.tree.leaves(eight.ema)):
        # A gradient of nearly zero may differ in sign: Adam moves by the rate.
        np.testing.assert_allclose(a, b, atol=4e-2)


def test_the_loss_and_errors_are_those_of_the_mixed_images(tiny_config):
    """By NumPy from the logits; the first net is known, and so are the drawn images."""
    use_modern_options(tiny_config)
    setup = parts(tiny_config, 1)
    feed = setup.feed
    state, train_step = setup.fresh_state(), setup.train_step
    batch = next(iter(feed.training_batches(0, 32, 0)))
    pixels, labels = gather(feed.resident, batch)
    images, share = augment_and_mix(
        jax.random.fold_in(state.rng, 0),
        pixels,
        state.statistics,
        setup.config.augmentation,
    )
    assert 0 < share < 1
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits, _ = jax.jit(
        lambda v, x: setup.learner.model.apply(
            v, x, train=True, mutable=["batch_stats"]
        )
    )(variables, images)
    logits = np.asarray(logits, np.float64)
    state = train_step(state, feed.resident, batch)

    labels = np.asarray(labels)
    weights = np.zeros((32, 10))
    weights[np.arange(32), labels] += float(share)
    weights[np.arange(32), labels[::-1]] += 1 - float(share)
    targets = 0.9 * (weights > 0.2) + 0.01
    per_class = np.log1p(np.exp(logits)) - targets * logits
    expected = per_class.mean(1).sum()
    assert float(state.sums.loss) == pytest.approx(expected, rel=1e-4)
    errors = (logits.argmax(1) != weights.argmax(1)).sum()
    assert int(state.sums.errors) == errors


def test_averages_are_taken_every_so_many_steps(tiny_config):
    use_modern_options(tiny_config)
    setup = parts(tiny_config, 1)
    feed = setup.feed
    state, train_step = setup.fresh_state(), setup.train_step
    expected = np.asarray(state.params["head"]["kernel"])
    for step, batch in zip(range(1, 6), feed.training_batches(0, 32, 0)):
        state = train_step(state, feed.resident, batch)
        if step in (2, 4):
            new = np.asarray(state.params["head"]["kernel"])
            expected = 0.5 * expected + 0.5 * new
        found = state.evaluation_variables()["params"]["head"]["kernel"]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_batch_that_does_not_divide_is_refused_with_those_that_do(tiny_config):
    tiny_config.training.global_batch_size = 20
    with pytest.raises(UserError, match=r"20 does not divide over 8 .* are 16 and 24"):
        parts(tiny_config, 8)


def test_update_is_sgd_with_momentum_and_decay_of_every_parameter(tiny_config):
    """Three steps by the equations, with gradients from plain jax.grad."""
    tiny_config.augmentation.pad = 0
    tiny_config.optimizer.weight_decay = 0.05
    tiny_config.schedule.kind = "piecewise"
    tiny_config.schedule.boundaries_steps = (2,)
    setup = parts(tiny_config, 1)
    feed = setup.feed
    fresh = setup.fresh_state()
    images = np.asarray(feed.resident["image"])
    params = jax.tree.map(np.asarray, fresh.params)
    stats = jax.tree.map(np.asarray, fresh.batch_stats)
    mean = np.asarray(fresh.statistics.mean)
    velocity = jax.tree.map(np.zeros_like, params)
    state, train_step = fresh, setup.train_step
    for rate, batch in zip((0.1, 0.1, 0.01), feed.training_batches(0, 32, 0)):
        chosen = np.asarray(batch["index"])
        x = images[chosen] / np.float32(255) - mean
        labels = np.asarray(feed.resident["label"])[chosen]

        def loss(p, x=x, labels=labels, stats=stats):
            logits, updates = setup.learner.model.apply(
                {"params": p, "batch_stats": stats}, x, True, mutable=["batch_stats"]
            )
            picked = jax.nn.log_softmax(logits)[jnp.arange(32), labels]
            return -picked.mean(), updates["batch_stats"]

        gradient, stats = jax.grad(loss, has_aux=True)(params)
        velocity = jax.tree.map(
            lambda v, g, p: 0.9 * v + g + 0.05 * p, velocity, gradient, params
        )
        params = jax.tree.map(lambda p, v, rate=rate: p - rate * v, params, velocity)
        state = train_step(state, feed.resident, batch)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params)):
        # Rounding alone moves 4e-5 by now; without the decay a scale moves 1e-2.
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_moving_averages_follow_the_parameters(tiny_config):
    tiny_config.optimizer.ema_decay = 0.5
    setup = parts(tiny_config, 1)
    feed = setup.feed
    state, train_step = setup.fresh_state(), setup.train_step
    expected = np.asarray(state.params["head"]["kernel"])
    for _, batch in zip(range(3), feed.training_batches(0, 32, 0)):
        state = train_step(state, feed.resident, batch)
        expected = 0.5 * expected + 0.5 * np.asarray(state.params["head"]["kernel"])
    found = state.evaluation_variables()["params"]["head"]["kernel"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_bfloat16_leaves_state_and_logits_in_float32(tiny_config):
    tiny_config.model.dtype = "bfloat16"
    setup = parts(tiny_config, 1)
    feed = setup.feed
    state = setup.fresh_state()
    batch = next(iter(feed.training_batches(0, 32, 0)))
    state = setup.train_step(state, feed.resident, batch)
    floats = [
        leaf.dtype
        for leaf in jax.tree.leaves((state.params, state.batch_stats, state.opt_state))
    ]
    assert set(floats) == {jnp.dtype(jnp.float32)}
    images = normalize(to_unit(feed.resident["image"][:4]), state.statistics)
    variables = state.evaluation_variables()
    assert (
        setup.learner.model.apply(variables, images, train=False).dtype == jnp.float32
    )
    maps = setup.learner.model.apply(variables, images, train=False, method="features")
    assert {m.array.dtype for m in maps} == {jnp.dtype(jnp.bfloat16)}


def test_the_first_bad_step_is_remembered(tiny_config):
    setup = parts(tiny_config, 1)
    feed = setup.feed
    state, train_step = setup.fresh_state(), setup.train_step
    for step, batch in zip(range(1, 5), feed.training_batches(0, 32, 0)):
        if step == 3:
            poisoned = jax.tree.map(lambda p: p * jnp.nan, state.params)
            state = state.replace(params=poisoned)
        state = train_step(state, feed.resident, batch)
        assert int(state.first_bad_step) == (-1 if step < 3 else 3)


def test_sums_count_what_the_mask_leaves():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 12)).astype(np.float32)
    labels = rng.integers(0, 12, 50)
    mask = rng.integers(0, 2, 50)
    logits[mask == 0] = np.nan  # padding may hold anything
    logits[np.flatnonzero(mask)[0]] = np.nan  # an example may not: it is an error
    losses = cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    found = batch_sums(
        jnp.asarray(logits), jnp.asarray(labels), losses, jnp.asarray(mask)
    )
    errors = top5 = 0
    for row, label in zip(logits[mask == 1], labels[mask == 1]):
        ranked = np.argsort(-row, kind="stable") if not np.isnan(row).any() else []
        errors += label not in ranked[:1]
        top5 += label not in ranked[:5]
    assert int(found.errors) == errors
    assert int(found.top5_errors) == top5
    assert int(found.count) == mask.sum()


def test_the_warm_up_by_the_error_ends_inside_the_step(tiny_config):
    """The rates that the steps used, against the average of the batches' errors."""
    tiny_config.schedule.warmup_learning_rate = 0.02
    tiny_config.schedule.warmup_until_error = 0.85
    setup = parts(tiny_config, 1)
    feed = setup.feed
    state, train_step = setup.fresh_state(), setup.train_step
    average, warming, expected, found, errors = 1.0, True, [], [], 0
    for _, batch in zip(range(40), feed.training_batches(0, 32, 0)):
        state = train_step(state, feed.resident, batch)
        expected.append(0.02 if warming else 0.1)
        found.append(float(state.learning_rate))
        batch_errors, errors = int(state.sums.errors) - errors, int(state.sums.errors)
        average = 0.9 * average + 0.1 * batch_errors / 32
        warming = warming and average >= 0.85
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert 0.02 in expected
    assert 0.1 in expected
