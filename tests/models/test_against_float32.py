"""Nets in bfloat16 against float32, compiled as users do.

Some versions of XLA fuse bfloat16 maps wrongly, see ``models.barriers.apart``.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models import create_model
from tests.models.test_jax_settings import images, net, training_gradient

BFLOAT16 = [
    ("cifar", 4, 32),
    ("cifar", 64, 32),
    ("regularised", 4, 32),
    ("without norm", 4, 32),
    ("preactivation", 4, 32),
    ("imagenet", 1, 64),
    ("highway", 2, 32),
    ("vgg", 2, 32),
]


@pytest.mark.parametrize(("name", "batch", "side"), BFLOAT16)
def test_bfloat16_is_close_to_float32(name, batch, side):
    x = images(batch, side)
    exact = net(name)
    variables = jax.jit(exact.init)(jax.random.key(1), x)
    found, expected = (
        np.asarray(jax.jit(model.apply)(variables, x))
        for model in (net(name, jnp.bfloat16), exact)
    )
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_preact_resnet8"])
def test_gradients_in_bfloat16_point_as_in_float32(name, frozen):
    x = images(8)
    exact, narrow = (
        create_model(name, dtype=dtype, batch_norm_frozen=frozen)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    variables = jax.jit(exact.init)(jax.random.key(1), x)
    gradient = jax.jit(training_gradient, static_argnums=0)
    expected, found = (
        jax.flatten_util.ravel_pytree(gradient(model, variables, x))[0]
        for model in (exact, narrow)
    )
    cosine = found @ expected / jnp.linalg.norm(found) / jnp.linalg.norm(expected)
    assert cosine > 0.98
