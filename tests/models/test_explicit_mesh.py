"""Nets on a mesh whose axes are explicit, as ``jax.make_mesh`` makes it by default."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from resnet_jax.models import create_model
from resnet_jax.models.platforms import compiling_for
from tests.models.reference import KEY, assert_trees_close


def gradients(net, images, mesh=None):
    """Of the mean logit, in training."""
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        variables = jax.jit(net.init)(KEY, jnp.zeros((1, *images.shape[1:])))
        if mesh:
            images = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))

        def mean(params):
            inputs = variables | {"params": params}
            return net.apply(inputs, images, train=True, mutable=["batch_stats"])[
                0
            ].mean()

        return jax.device_get(jax.jit(jax.grad(mean))(variables["params"]))


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "error"),
    [
        ("resnet10t", "cpu", jnp.float32, 1e-4),  # its pooling has a gradient by hand
        ("cifar_resnet8", "gpu", jnp.bfloat16, 0.3),  # its first stage is packed
    ],
)
def test_gradients_are_those_of_one_device(name, platform, dtype, error):
    net = create_model(name, dtype=dtype)
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with compiling_for(platform):
        assert_trees_close(gradients(net, images, mesh), gradients(net, images), error)
