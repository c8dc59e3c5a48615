"""Counts against closed forms, layer by layer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from resnet_jax.analysis.complexity import (
    abstract_variables,
    count_multiply_adds,
    count_parameters,
)


class Net(nn.Module):
    """Any function of the images, with a net's signature; may create layers."""

    function: Callable

    @nn.compact
    def __call__(self, images, train=False):
        return self.function(images)


def multiply_adds(function, image_shape):
    return count_multiply_adds(Net(function), image_shape)


def test_convolution():
    count = multiply_adds(
        lambda x: nn.Conv(5, (3, 3), strides=2, padding=1)(x), (9, 8, 4)
    )
    assert count == 5 * 4 * (3 * 3 * 4) * 5  # 5x4 pixels, taps on the padding too


def test_unpadded_oblong_convolution():
    count = multiply_adds(lambda x: nn.Conv(7, (1, 5), padding="VALID")(x), (6, 9, 2))
    assert count == 6 * 5 * (1 * 5 * 2) * 7


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_grouped_convolution(groups):
    count = multiply_adds(
        lambda x: nn.Conv(16, (3, 3), feature_group_count=groups)(x), (6, 6, 8)
    )
    assert count == 6 * 6 * (3 * 3 * 8 // groups) * 16


def test_a_layout_with_the_channels_first():
    def convolve(x):
        kernel = jnp.zeros((7, 4, 3, 3))
        return jax.lax.conv_general_dilated(
            x.transpose(0, 3, 1, 2), kernel, (1, 1), "VALID"
        )

    assert multiply_adds(convolve, (8, 6, 4)) == 6 * 4 * (3 * 3 * 4) * 7


def test_dense():
    assert multiply_adds(lambda x: nn.Dense(11)(x.mean((1, 2))), (4, 4, 6)) == 6 * 11
    # Applied to every pixel, it is a 1x1 convolution.
    assert multiply_adds(lambda x: nn.Dense(11)(x), (4, 5, 6)) == 4 * 5 * 6 * 11


def test_product_with_a_batch_axis():
    count = multiply_adds(
        lambda x: jnp.einsum("nhwc,nhvc->nhwv", x, x), (3, 5, 7)
    )  # attention along the width: for each of 3 rows, 5 x 5 products of 7
    assert count == 3 * 5 * 5 * 7


def test_what_does_not_count():
    def function(x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.max_pool(x, (2, 2)) + nn.avg_pool(x, (2, 2))

    assert multiply_adds(function, (8, 8, 3)) == 0


CONVOLUTION = 6 * 6 * (3 * 3 * 4) * 4  # of the next function, on 6x6x4 images


def convolve(x):
    return jax.lax.conv_general_dilated(
        x,
        jnp.ones((3, 3, 4, 4)),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def scanned(x, length=5):
    return jax.lax.scan(lambda x, _: (convolve(x), None), x, length=length)[0]


@jax.custom_vjp
def with_own_gradient(x):
    return convolve(x)


with_own_gradient.defvjp(lambda x: (convolve(x), x), lambda x, g: (convolve(g),))


@pytest.mark.parametrize(
    ("function", "times"),
    [
        (lambda x: convolve(convolve(x)), 2),
        (jax.jit(convolve), 1),
        (jax.jit(lambda x: jax.jit(convolve)(jax.jit(convolve)(x))), 2),
        (jax.checkpoint(convolve), 1),
        (with_own_gradient, 1),
        (scanned, 5),
        (jax.jit(lambda x: jax.checkpoint(scanned)(x)), 5),
        (lambda x: jax.lax.scan(lambda x, _: (scanned(x), None), x, length=3)[0], 15),
        (lambda x: jax.lax.map(convolve, jnp.stack([x, x, x])), 3),
        (lambda x: jax.lax.fori_loop(0, 4, lambda _, x: convolve(x), x), 4),
    ],
    ids=[
        "twice",
        "jit",
        "nested-jit",
        "checkpoint",
        "custom-vjp",
        "scan",
        "scan-in-checkpoint-in-jit",
        "scan-in-scan",
        "map",
        "fori-loop",
    ],
)
def test_inside_transformations(function, times):
    assert multiply_adds(function, (6, 6, 4)) == times * CONVOLUTION


@pytest.mark.parametrize("transform", [nn.remat, nn.jit])
def test_inside_lifted_transformations(transform):
    def function(x):
        x = transform(nn.Conv)(4, (3, 3))(x)
        return transform(nn.Dense)(2)(x)

    assert multiply_adds(function, (6, 6, 4)) == CONVOLUTION + 6 * 6 * 4 * 2


class Step(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (3, 3))(x), None


def test_layers_scanned_over_their_parameters():
    def function(x):
        layers = nn.scan(
            Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=7
        )
        return layers()(x)[0]

    assert multiply_adds(function, (6, 6, 4)) == 7 * CONVOLUTION
    params = abstract_variables(Net(function), (6, 6, 4))["params"]
    assert count_parameters(params) == 7 * (3 * 3 * 4 * 4 + 4)


def test_parameters():
    def function(x):
        x = nn.Conv(6, (3, 5), use_bias=False)(x)
        return nn.Dense(10)(nn.BatchNorm(use_running_average=True)(x))

    variables = abstract_variables(Net(function), (8, 8, 4))
    assert count_parameters(variables["params"]) == 3 * 5 * 4 * 6 + 2 * 6 + 6 * 10 + 10
    assert count_parameters({"scalar": jnp.zeros(()), "none": {}}) == 1


def test_abstract_variables_hold_shapes_alone():
    # A kernel of 4 TB, were it made.
    variables = abstract_variables(Net(lambda x: nn.Dense(10**6)(x)), (1, 1, 10**6))
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(variables)
    )
    assert count_parameters(variables["params"]) == 10**12 + 10**6


class Controlled(nn.Module):
    """A product of 1x64 by 64x64 in a branch or a loop that is not unrolled."""

    kind: str

    @nn.compact
    def __call__(self, x, train=False):
        kernel = self.param("kernel", nn.initializers.ones, (64, 64))
        y = x.reshape(1, 64)

        def product(y):
            return y @ kernel

        if self.kind == "cond":
            return jax.lax.cond(y.sum() > 0, product, lambda y: product(product(y)), y)
        return jax.lax.while_loop(lambda y: y.sum() < 1, product, y)


def test_of_two_branches_the_dearer_counts():
    assert count_multiply_adds(Controlled("cond"), (8, 8, 1)) == 2 * 64 * 64


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="while loop"):
        count_multiply_adds(Controlled("while"), (8, 8, 1))
