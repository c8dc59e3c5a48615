"""Squeeze-and-excitation against its equations (Hu et al. 2018, 2 to 4)."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models import SqueezeExcite
from tests.models.reference import KEY, apply, random_variables, relu


def by_hand(x, params):
    squeezed = x.mean((1, 2), dtype=np.float64)
    hidden = squeezed @ params["reduce"]["kernel"] + params["reduce"]["bias"]
    gate = relu(hidden) @ params["expand"]["kernel"] + params["expand"]["bias"]
    return x / (1 + np.exp(-gate[:, None, None]))


@pytest.mark.parametrize(("height", "width"), [(5, 4), (1, 1)])
def test_channels_are_scaled_by_a_gate_of_their_means(height, width):
    rng = np.random.default_rng(0)
    x = (1 + rng.normal(size=(3, height, width, 32))).astype(np.float32)
    module = SqueezeExcite()
    variables = random_variables(module, x)
    expected = by_hand(x, variables["params"])
    np.testing.assert_allclose(apply(module, variables, x), expected, rtol=1e-4)


def hidden_channels(channels, **options):
    module = SqueezeExcite(**options)
    x = jax.ShapeDtypeStruct((1, 2, 2, channels), jnp.float32)
    params = jax.eval_shape(module.init, KEY, x)["params"]
    hidden = params["reduce"]["bias"].shape[0]
    assert jax.tree.map(np.shape, params) == {
        "reduce": {"kernel": (channels, hidden), "bias": (hidden,)},
        "expand": {"kernel": (hidden, channels), "bias": (channels,)},
    }
    return hidden


def nearest_multiple(channels, ratio, divisor):
    """Of the divisor, to channels x ratio; halves go up, and it is one at least."""
    exact = fractions.Fraction(channels) * fractions.Fraction(ratio) / divisor
    return max((exact + fractions.Fraction(1, 2)) // 1, 1) * divisor


@pytest.mark.parametrize(
    ("channels", "hidden"),
    [(8, 8), (64, 8), (128, 8), (191, 8), (192, 16), (256, 16), (512, 32), (2048, 128)],
)
def test_hidden_channels_of_timms_nets(channels, hidden):
    assert hidden_channels(channels) == nearest_multiple(channels, 1 / 16, 8) == hidden


@pytest.mark.parametrize("channels", [4, 8, 23, 24, 40, 64, 100])
@pytest.mark.parametrize(("ratio", "divisor"), [(1 / 16, 1), (1 / 4, 1), (1 / 4, 8)])
def test_hidden_channels_by_ratio_and_divisor(channels, ratio, divisor):
    hidden = hidden_channels(channels, ratio=ratio, divisor=divisor)
    assert hidden == nearest_multiple(channels, ratio, divisor)


def test_the_papers_own_hidden_channels_are_a_sixteenth():
    assert hidden_channels(64, divisor=1) == 4
    assert hidden_channels(2048, divisor=1) == 128


def test_the_mean_of_a_bfloat16_map_is_that_of_float32():
    """A running sum in bfloat16 would stop at 256 ones."""
    x = np.ones((1, 64, 64, 16), np.float32)
    x[0, :8] = 9
    module = SqueezeExcite()
    # Halved: an error of a gate's large input would be a larger one of the gate.
    variables = jax.tree.map(lambda leaf: leaf / 2, random_variables(module, x))
    expected = by_hand(x, variables["params"])
    y = apply(module, variables, jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0.03)


def test_it_starts_near_a_half():
    """sigmoid of a small number: with no biases the gate of a zero map is a half."""
    x = np.zeros((1, 2, 2, 16), np.float32)
    variables = jax.jit(SqueezeExcite().init)(KEY, x)
    for layer in variables["params"].values():
        np.testing.assert_array_equal(layer["bias"], 0)
    ones = jnp.full_like(x, 1e-6)
    gate = np.asarray(apply(SqueezeExcite(), variables, ones)) / 1e-6
    np.testing.assert_allclose(gate, 0.5, rtol=1e-4)
