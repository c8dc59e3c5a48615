"""Forms of the first convolution: the same function of the same parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.models import BasicBlock, ImageNetStem, ResNet, create_model
from resnet_jax.models.convolution import STEM_ALGORITHMS, convolve
from tests.models.reference import (
    KEY,
    assert_trees_close,
    assert_trees_equal,
    convolution,
    double_precision,
)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("sides", [(9, 6), (1, 8)])
@pytest.mark.parametrize("algorithm", STEM_ALGORITHMS)
def test_against_nested_loops(algorithm, sides, size, channels):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *sides, channels)).astype(np.float32)
    kernel = rng.normal(size=(size, size, channels, 6)).astype(np.float32)
    y = convolve(x, kernel, 2, algorithm=algorithm)
    np.testing.assert_allclose(y, convolution(x, kernel, 2), atol=1e-4)


@pytest.mark.parametrize("side", [224, 225, 97])
@pytest.mark.parametrize("algorithm", STEM_ALGORITHMS)
def test_values_and_gradients_are_the_plain_stems(algorithm, side):
    rng = np.random.default_rng(side)
    x, kernel = rng.normal(size=(1, side, side, 3)), rng.normal(size=(7, 7, 3, 4))
    cotangent = rng.normal(size=(1, -(-side // 2), -(-side // 2), 4))

    def run(algorithm, x, kernel, cotangent):
        call = functools.partial(convolve, strides=2, algorithm=algorithm)
        y, pull = jax.vjp(call, x, kernel)
        return y, pull(cotangent)

    with double_precision():
        run = jax.jit(run, static_argnums=0)
        ours, expected = (
            jax.tree.map(np.asarray, run(form, x, kernel, cotangent))
            for form in (algorithm, "xla")
        )
    assert_trees_close(ours, expected, 1e-12)


def test_it_is_one_convolution_of_stride_1_on_12_channels():
    def convolutions(algorithm):
        shapes = (1, 224, 224, 3), (7, 7, 3, 64)
        call = functools.partial(convolve, strides=2, algorithm=algorithm)
        program = jax.make_jaxpr(call)(*map(jnp.zeros, shapes))
        return [
            (
                *(atom.aval.shape for atom in equation.invars),
                *equation.params["padding"],
            )
            for equation in program.jaxpr.eqns
            if equation.primitive.name == "conv_general_dilated"
        ]

    assert convolutions("space_to_depth") == [
        ((1, 112, 112, 12), (4, 4, 12, 64), (2, 1), (2, 1))
    ]
    assert convolutions("four_channels") == [
        ((1, 224, 224, 4), (7, 7, 4, 64), (3, 3), (3, 3))
    ]


@pytest.mark.parametrize("form", STEM_ALGORITHMS)
def test_a_net_has_the_same_parameters_and_logits(form):
    net = ResNet((1,), BasicBlock, width=4, num_classes=3)
    other = net.clone(stem=functools.partial(ImageNetStem, form=form))
    images = jax.random.normal(KEY, (2, 17, 20, 3))
    variables = jax.jit(net.init)(KEY, images)
    assert_trees_equal(jax.jit(other.init)(KEY, images), variables)
    expected = jax.jit(net.apply)(variables, images)
    np.testing.assert_allclose(
        jax.jit(other.apply)(variables, images), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("algorithm", "options", "sentence"),
    [
        ("space_to_depth", {"strides": 1}, "not of stride 1, dilation 1 and 1 groups$"),
        ("space_to_depth", {"strides": 2, "dilation": 2}, "dilation 2"),
        ("space_to_depth", {"strides": 2, "groups": 2}, "2 groups$"),
        ("four_channels", {"groups": 2}, "not 6 in 2$"),
        ("four_channels", {}, "not 6 in 1$"),
    ],
)
def test_what_they_are_not_for_is_refused(algorithm, options, sentence):
    x, kernel = jnp.zeros((1, 8, 8, 6)), jnp.zeros((3, 3, 6, 4))
    with pytest.raises(ValueError, match=rf"^{algorithm} is for .*{sentence}"):
        convolve(x, kernel, algorithm=algorithm, **options)


@pytest.mark.parametrize("form", STEM_ALGORITHMS)
def test_the_nets_option(form):
    model = create_model("resnet50", stem_form=form)
    assert model.stem.func is ImageNetStem
    assert model.stem.keywords == {"form": form}
    assert create_model("resnet50", stem_form="conv") == create_model("resnet50")
    for name in ("cifar_resnet20", "resnet50d", "vgg16"):
        with pytest.raises(UserError, match=rf"^model {name} has no option stem_form$"):
            create_model(name, stem_form=form)
