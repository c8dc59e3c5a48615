"""Both ways to convolve, their gradients and the gradients' gradients.

In float64, where the ways differ by rounding alone: values and first gradients against
torch's, and everything of "products" against "xla".
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models.conv import convolve

torch = pytest.importorskip("torch", reason="torch is the reference of these tests")

from tests.torch_reference import one_torch_thread, relative_error  # noqa: E402

# Size of the kernel, channels, strides, dilation, groups.
KINDS = [
    (1, 5, 1, 1, 1),
    (1, 5, 2, 1, 1),
    (3, 3, 1, 1, 1),
    (3, 3, 2, 1, 1),
    (3, 32, 1, 1, 1),
    (3, 32, 2, 1, 1),
    (3, 32, 1, 2, 1),
    (3, 32, 2, 2, 1),
    (3, 32, 2, 1, 8),
    (3, 32, 1, 2, 8),
    (7, 3, 2, 1, 1),
]
FEATURES = 8
# One side of each parity; the second is less than the reach of the widest kernel.
HEIGHT, WIDTH = 9, 6


def draw(size, channels, strides, groups):
    """An image batch and a kernel, a tangent for each, and the output's cotangent."""
    rng = np.random.default_rng(0)
    output = (2, -(-HEIGHT // strides), -(-WIDTH // strides), FEATURES)
    image = (2, HEIGHT, WIDTH, channels)
    kernel = (size, size, channels // groups, FEATURES)
    return [rng.normal(size=shape) for shape in (image, kernel, image, kernel, output)]


@functools.partial(
    jax.jit,
    static_argnums=(0, 1, 2, 3),
    compiler_options={"xla_backend_optimization_level": 0},
)
def derivatives(strides, dilation, groups, algorithm, x, kernel, dx, dk, cotangent):
    """The convolution, its gradients and products with its second derivatives."""
    run = functools.partial(
        convolve,
        strides=strides,
        dilation=dilation,
        groups=groups,
        algorithm=algorithm,
    )
    point, direction = (x, kernel), (dx, dk)
    value, pull = jax.vjp(run, *point)
    gradient = jax.grad(
        lambda *point: jnp.vdot(jnp.tanh(run(*point)), cotangent), argnums=(0, 1)
    )

    def along(*point):
        return sum(map(jnp.vdot, gradient(*point), direction))

    return {
        "value": value,
        "gradients": pull(cotangent),
        "tangent": jax.jvp(run, point, direction)[1],
        "forward over reverse": jax.jvp(gradient, point, direction)[1],
        "reverse over reverse": jax.grad(along, argnums=(0, 1))(*point),
        # As for gradients of each example by itself.
        "batched": jax.vmap(
            lambda x: jax.grad(
                lambda kernel: jnp.vdot(run(x[None], kernel)[0], cotangent[0])
            )(kernel)
        )(x),
    }


@pytest.mark.parametrize(("size", "channels", "strides", "dilation", "groups"), KINDS)
def test_convolutions(size, channels, strides, dilation, groups):
    arrays = draw(size, channels, strides, groups)
    with jax.enable_x64(True):
        xla, products = (
            derivatives(strides, dilation, groups, algorithm, *arrays)
            for algorithm in ("xla", "products")
        )
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(products))
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: relative_error(a, np.asarray(b)) < 1e-12, products, xla
        )
    )

    x, kernel, _, _, cotangent = arrays
    maps = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    weight = torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    with one_torch_thread():
        output = torch.nn.functional.conv2d(
            maps, weight, None, strides, size // 2 * dilation, dilation, groups
        )
        output.backward(torch.tensor(cotangent.transpose(0, 3, 1, 2)))
    expected = (
        output.detach().numpy().transpose(0, 2, 3, 1),
        maps.grad.numpy().transpose(0, 2, 3, 1),
        weight.grad.numpy().transpose(2, 3, 1, 0),
    )
    for ours in (xla, products):
        for array, truth in zip((ours["value"], *ours["gradients"]), expected):
            assert relative_error(array, truth) < 1e-12
