"""Batch normalisation against its equations in NumPy, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models import BatchNorm
from tests.models.reference import EPSILON, double_precision

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


@functools.cache
def compiled(**options):
    norm = BatchNorm(use_running_average=False, **options)
    return jax.jit(functools.partial(norm.apply, mutable=["batch_stats"]))


def train_pass(variables, x, **options):
    """The output, and the new running mean and variance."""
    y, updated = compiled(**options)(variables, x)
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


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_running_statistics_decay_towards_the_average_over_the_groups(
    rng, groups, momentum, unbiased
):
    """Each group's variance is divided by its own number of values less one."""
    variables = variables_of(rng, 6)
    batches = (1 + 2 * rng.normal(size=(3, 8, 2, 3, 6))).astype(np.float32)
    mean, var = variables["batch_stats"]["mean"], variables["batch_stats"]["var"]
    expected_mean, expected_var = momentum**3 * mean, momentum**3 * var
    for age, batch in zip((2, 1, 0), batches, strict=True):
        parts, means, _ = statistics(batch, groups)
        variances = [part.var(0, ddof=int(unbiased)) for part in parts]
        weight = (1 - momentum) * momentum**age
        expected_mean = expected_mean + weight * np.mean(means, 0)
        expected_var = expected_var + weight * np.mean(variances, 0)
        stats = {"mean": mean, "var": var}
        options = {"groups": groups, "momentum": momentum, "unbiased": unbiased}
        _, mean, var = train_pass(variables | {"batch_stats": stats}, batch, **options)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, expected_var, rtol=1e-5)


def test_the_running_variance_is_unbiased_unless_told_otherwise(rng):
    """The factor m / (m - 1) of a group's m values: 2 where these are two."""
    variables = variables_of(rng, 6)
    variables["batch_stats"]["var"][:] = 0
    x = rng.normal(size=(4, 1, 1, 6)).astype(np.float32)
    _, _, by_default = train_pass(variables, x, groups=2)
    _, _, biased = train_pass(variables, x, groups=2, unbiased=False)
    np.testing.assert_allclose(by_default, 2 * biased, rtol=1e-6)
    assert (np.asarray(biased) > 0).all()


def test_a_single_value_has_no_unbiased_variance(rng):
    """Its deviation is 0, not 0 / 0."""
    variables = variables_of(rng, 6)
    y, _, var = train_pass(variables, rng.normal(size=(1, 1, 1, 6)), groups=1)
    np.testing.assert_allclose(var, 0.9 * variables["batch_stats"]["var"], rtol=1e-6)
    np.testing.assert_allclose(
        y[0, 0, 0], variables["params"]["bias"], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("groups", GROUPS)
def test_three_batches_of_torch(rng, groups):
    """Outputs and running statistics; torch has no groups, but can take parts alone."""
    torch = pytest.importorskip("torch", reason="torch is the reference of this test")
    variables = variables_of(rng, 6)
    batches = (2 + 3 * rng.normal(size=(3, 8, 2, 2, 6))).astype(np.float32)

    def torch_norm(stats):
        norm = torch.nn.BatchNorm2d(6, momentum=0.1).double()
        state = {
            "weight": variables["params"]["scale"],
            "bias": variables["params"]["bias"],
            "running_mean": stats["mean"],
            "running_var": stats["var"],
            "num_batches_tracked": np.array(0),
        }
        norm.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
        return norm

    stats = theirs = variables["batch_stats"]
    for batch in batches:
        y, mean, var = train_pass(
            variables | {"batch_stats": stats}, batch, groups=groups
        )
        stats = {"mean": mean, "var": var}
        outputs, norms = [], []
        for part in np.split(batch.astype(np.float64), groups):
            norms.append(torch_norm(theirs))
            maps = torch.from_numpy(part.transpose(0, 3, 1, 2))
            outputs.append(norms[-1](maps).detach().numpy().transpose(0, 2, 3, 1))
        theirs = {
            "mean": np.mean([norm.running_mean.numpy() for norm in norms], 0),
            "var": np.mean([norm.running_var.numpy() for norm in norms], 0),
        }
        np.testing.assert_allclose(y, np.concatenate(outputs), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["mean"], theirs["mean"], rtol=1e-5)
    np.testing.assert_allclose(stats["var"], theirs["var"], rtol=1e-5)


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
    [part], [expected_mean], _ = statistics(x)
    np.testing.assert_allclose(mean, expected_mean, rtol=2e-6)
    np.testing.assert_allclose(var, part.var(0, ddof=1), rtol=1e-3)
    np.testing.assert_allclose(y, normalized(x), atol=2e-2)


def test_a_constant_channel_gives_the_bias(rng):
    variables = variables_of(rng, 2)
    y, _, _ = train_pass(variables, np.full((4, 3, 3, 2), 7, np.float32))
    bias = np.broadcast_to(variables["params"]["bias"], y.shape)
    np.testing.assert_array_equal(y, bias)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("value", [1e-3, 3.3, 1e4])
def test_a_variance_is_never_negative(rng, groups, value):
    """E[x^2] - E[x]^2 is, of numbers so nearly equal, as often as not."""
    variables = variables_of(rng, 64)
    variables["batch_stats"]["var"][:] = 0
    noise = 1 + 1e-7 * rng.normal(size=(8, 5, 7, 64))
    _, _, var = train_pass(variables, (value * noise).astype(np.float32), groups=groups)
    assert (np.asarray(var) >= 0).all()


def test_float64_stays_float64(rng):
    """Not a digit is lost: the comparisons of whole nets rely on it."""
    x = 1000 + rng.normal(size=(8, 3, 3, 6))
    variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables_of(rng, 6))
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    with double_precision():
        y, mean, var = train_pass(variables, x, dtype=jnp.float64)
        assert y.dtype == mean.dtype == var.dtype == np.float64
    [part], [batch_mean], _ = statistics(x)
    stats = variables["batch_stats"]
    np.testing.assert_allclose(y, normalized(x) * scale + bias, rtol=0, atol=1e-10)
    np.testing.assert_allclose(mean, 0.9 * stats["mean"] + 0.1 * batch_mean, rtol=1e-13)
    expected = 0.9 * stats["var"] + 0.1 * part.var(0, ddof=1)
    np.testing.assert_allclose(var, expected, rtol=1e-11)


def test_frozen_in_training(rng):
    """By the running statistics, which stay; and no gradient runs through a batch."""
    variables = variables_of(rng, 6)
    x = (3 + 2 * rng.normal(size=(4, 2, 2, 6))).astype(np.float32)
    norm = BatchNorm(use_running_average=True, groups=3)  # no group divides 4

    @jax.jit
    def pass_through(params, x):
        y, updated = norm.apply(
            variables | {"params": params}, x, mutable=["batch_stats"]
        )
        return y, updated

    params, stats = variables["params"], variables["batch_stats"]
    y, updated = pass_through(params, x)
    for name, leaf in updated.get("batch_stats", stats).items():
        np.testing.assert_array_equal(leaf, stats[name])
    slope = params["scale"] / np.sqrt(stats["var"] + EPSILON)
    expected = (x.astype(np.float64) - stats["mean"]) * slope + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: pass_through(params, x)[0].sum())(x)
    np.testing.assert_allclose(gradient, np.broadcast_to(slope, x.shape), rtol=1e-5)


def test_the_scale_starts_at_one_or_as_told():
    for init, start in ((jax.nn.initializers.ones, 1), (jax.nn.initializers.zeros, 0)):
        norm = BatchNorm(use_running_average=True, scale_init=init)
        params = norm.init(jax.random.key(0), np.ones((1, 1, 1, 3)))["params"]
        np.testing.assert_array_equal(params["scale"], np.full(3, start))
        np.testing.assert_array_equal(params["bias"], np.zeros(3))


@pytest.mark.parametrize("groups", GROUPS)
def test_bfloat16_is_normalised_in_float32(rng, groups):
    x = jnp.asarray(5 + rng.normal(size=(8, 8, 8, 6)), jnp.bfloat16)
    variables = variables_of(rng, 6)
    y, mean, var = train_pass(variables, x, groups=groups, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    assert mean.dtype == var.dtype == jnp.float32

    exact = np.asarray(x, np.float64)
    parts, means, _ = statistics(exact, groups)
    variances = [part.var(0, ddof=1) for part in parts]
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
