"""Batch normalisation against its equations in NumPy, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models import BatchNorm

EPSILON = 1e-5
GROUPS = [1, 4]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def variables_of(rng, channels):
    draw = {
        "params": {
            "scale": rng.uniform(0.5, 1.5, channels),
            "bias": rng.normal(size=channels),
        },
        "batch_stats": {
            "mean": rng.normal(size=channels),
            "var": rng.uniform(0.5, 1.5, channels),
        },
    }
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), draw)


def train_pass(variables, x, **options):
    """The output, and the new running mean and variance."""
    norm = BatchNorm(use_running_average=False, **options)
    y, updated = jax.jit(functools.partial(norm.apply, mutable=["batch_stats"]))(
        variables, x
    )
    return y, updated["batch_stats"]["mean"], updated["batch_stats"]["var"]


def statistics(x, groups=1):
    """The biased statistics of each consecutive part of the batch, and the parts."""
    parts = np.split(np.asarray(x, np.float64), groups)
    parts = [part.reshape(-1, x.shape[-1]) for part in parts]
    return parts, [p.mean(0) for p in parts], [p.var(0) for p in parts]


def normalized(x, groups=1):
    parts, means, variances = statistics(x, groups)
    rows = [
        (part - mean) / np.sqrt(var + EPSILON)
        for part, mean, var in zip(parts, means, variances, strict=True)
    ]
    return np.concatenate(rows).reshape(x.shape)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("shape", [(8, 5, 3, 6), (16, 6)], ids=["maps", "vectors"])
def test_training(rng, shape, groups):
    x = (3 + 2 * rng.normal(size=shape)).astype(np.float32)
    variables = variables_of(rng, shape[-1])
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    y, _, _ = train_pass(variables, x, groups=groups)
    expected = normalized(x, groups) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_running_statistics_decay_towards_the_average_over_the_groups(
    rng, groups, momentum
):
    variables = variables_of(rng, 6)
    batches = (1 + 2 * rng.normal(size=(3, 8, 4, 4, 6))).astype(np.float32)
    mean, var = variables["batch_stats"]["mean"], variables["batch_stats"]["var"]
    expected_mean, expected_var = momentum**3 * mean, momentum**3 * var
    for age, batch in zip((2, 1, 0), batches, strict=True):
        _, means, variances = statistics(batch, groups)
        weight = (1 - momentum) * momentum**age
        expected_mean = expected_mean + weight * np.mean(means, 0)
        expected_var = expected_var + weight * np.mean(variances, 0)
        stats = {"mean": mean, "var": var}
        _, mean, var = train_pass(
            variables | {"batch_stats": stats}, batch, groups=groups, momentum=momentum
        )
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, expected_var, rtol=1e-5)


@pytest.mark.parametrize("groups", GROUPS)
def test_evaluation_uses_and_keeps_the_running_statistics(rng, groups):
    variables = variables_of(rng, 6)
    x = rng.normal(size=(3, 4, 4, 6)).astype(np.float32)  # 3 is no multiple of 4
    norm = BatchNorm(use_running_average=True, groups=groups)
    y, updated = norm.apply(variables, x, mutable=["batch_stats"])
    stats, params = variables["batch_stats"], variables["params"]
    x = x.astype(np.float64)
    expected = (x - stats["mean"]) / np.sqrt(stats["var"] + EPSILON)
    expected = expected * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        np.testing.assert_array_equal, updated.get("batch_stats", stats), stats
    )


def test_variance_of_numbers_far_from_zero(rng):
    # E[x^2] - E[x]^2 in float32 is off by about 1e4 * 2^-24, six times the variance.
    # A mean in float32 is off by about 1e-4 itself, a hundredth of the deviation.
    x = (100 + 0.01 * rng.normal(size=(16, 4, 4, 4))).astype(np.float32)
    variables = {
        "params": {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)},
        "batch_stats": {
            "mean": np.zeros(4, np.float32),
            "var": np.zeros(4, np.float32),
        },
    }
    y, mean, var = train_pass(variables, x, momentum=0.0)
    _, [expected_mean], [expected_var] = statistics(x)
    np.testing.assert_allclose(mean, expected_mean, rtol=2e-6)
    np.testing.assert_allclose(var, expected_var, rtol=1e-3)
    np.testing.assert_allclose(y, normalized(x), atol=2e-2)


def test_a_constant_channel_gives_the_bias(rng):
    variables = variables_of(rng, 2)
    y, _, _ = train_pass(variables, np.full((4, 3, 3, 2), 7, np.float32))
    bias = np.broadcast_to(variables["params"]["bias"], y.shape)
    np.testing.assert_array_equal(y, bias)


@pytest.mark.parametrize("groups", GROUPS)
def test_bfloat16_is_normalised_in_float32(rng, groups):
    x = jnp.asarray(5 + rng.normal(size=(8, 8, 8, 6)), jnp.bfloat16)
    variables = variables_of(rng, 6)
    y, mean, var = train_pass(variables, x, groups=groups, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    assert mean.dtype == var.dtype == jnp.float32

    exact = np.asarray(x, np.float64)
    _, means, variances = statistics(exact, groups)
    stats, params = variables["batch_stats"], variables["params"]
    np.testing.assert_allclose(
        mean, 0.9 * stats["mean"] + 0.1 * np.mean(means, 0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        var, 0.9 * stats["var"] + 0.1 * np.mean(variances, 0), rtol=1e-5
    )
    expected = normalized(exact, groups) * params["scale"] + params["bias"]
    # One rounding of the result to bfloat16's 8 bits, and no more.
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected, rtol=2.0**-8, atol=1e-5
    )


@pytest.mark.parametrize("groups", GROUPS)
def test_gradients(rng, groups):
    """Against the closed form of Ioffe & Szegedy, section 3."""
    x = (1 + 2 * rng.normal(size=(8, 3, 3, 6))).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    variables = variables_of(rng, 6)

    def loss(params, x):
        y, _, _ = train_pass(variables | {"params": params}, x, groups=groups)
        return jnp.vdot(y, cotangent)

    params_gradient, x_gradient = jax.grad(loss, argnums=(0, 1))(variables["params"], x)
    unit = normalized(x, groups)
    dy = cotangent.astype(np.float64)
    np.testing.assert_allclose(
        params_gradient["scale"], (dy * unit).sum((0, 1, 2)), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        params_gradient["bias"], dy.sum((0, 1, 2)), rtol=1e-4, atol=1e-4
    )
    scale = variables["params"]["scale"]
    _, _, variances = statistics(x, groups)
    for part, y, g, var in zip(
        np.split(np.asarray(x_gradient), groups),
        np.split(unit, groups),
        np.split(dy, groups),
        variances,
        strict=True,
    ):
        centred = g - g.mean((0, 1, 2)) - y * (g * y).mean((0, 1, 2))
        expected = scale * centred / np.sqrt(var + EPSILON)
        np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-5)


def test_groups_that_do_not_divide_the_batch_are_refused(rng):
    x = np.zeros((6, 2, 2, 3), np.float32)
    with pytest.raises(ValueError, match=r"batch of 6 .* 4 "):
        train_pass(variables_of(rng, 3), x, groups=4)


def test_initialisation_takes_one_image_whatever_the_groups():
    norm = BatchNorm(use_running_average=False, groups=8)
    variables = norm.init(jax.random.key(0), np.full((1, 2, 2, 3), 5, np.float32))
    jax.tree.map(
        np.testing.assert_array_equal,
        variables,
        {
            "params": {"scale": np.ones(3), "bias": np.zeros(3)},
            "batch_stats": {"mean": np.zeros(3), "var": np.ones(3)},
        },
    )
