"""Images in padded batches against each image alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models import VGG, create_model
from resnet_jax.models.masking import apply_masked, sizes_of_map
from tests.models.reference import random_variables

SIZES = [(33, 64), (64, 41), (50, 37), (64, 64)]
X = np.zeros((1, 64, 64, 3), np.float32)
SMALL = {"num_classes": 5}
NETS = {
    "biases": functools.partial(
        create_model, "cifar_resnet20", normalization="none", **SMALL
    ),
    "bottleneck, pooled shortcuts, deep stem": functools.partial(
        create_model, "resnet26d", **SMALL
    ),
    "squeeze and excitation": functools.partial(
        create_model, "cifar_resnet20", squeeze_excite=True, **SMALL
    ),
    "pre-activation": functools.partial(create_model, "cifar_preact_resnet20", **SMALL),
    "scanned": functools.partial(create_model, "cifar_resnet20", scan=True, **SMALL),
    "remat": functools.partial(
        create_model, "cifar_resnet20_b", scan=True, remat=True, **SMALL
    ),
    "gates": functools.partial(
        create_model, "cifar_resnet20", shortcut="exclusive_gate", **SMALL
    ),
    "dilated": functools.partial(create_model, "resnet18_a", output_stride=8, **SMALL),
    "highway": functools.partial(create_model, "cifar_highway19", **SMALL),
    "vgg": lambda: VGG((1, 1, 1), (4, 8, 8), 5, 16, batch_norm=True),
    "bfloat16": functools.partial(
        create_model, "cifar_resnet20", dtype=jnp.bfloat16, **SMALL
    ),
}


def padded_batch(images, height=64, width=64):
    """Images in the corner of a canvas of noise, which must have no effect."""
    noise = np.random.default_rng(1).normal(10, 5, (len(images), height, width, 3))
    batch = noise.astype(np.float32)
    for canvas, image in zip(batch, images):
        canvas[: image.shape[0], : image.shape[1]] = image
    return batch


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(*size, 3)).astype(np.float32) for size in SIZES]


@pytest.mark.parametrize("name", NETS)
def test_logits_are_those_of_each_image_alone(name, images):
    model = NETS[name]()
    variables = random_variables(model, X)
    sizes = np.array(SIZES, np.int32)
    batch = padded_batch(images)
    apply = jax.jit(functools.partial(apply_masked, model))
    alone = jax.jit(model.apply)
    logits = apply(variables, batch, sizes)
    expected = np.concatenate([alone(variables, image[None]) for image in images])
    scale = np.abs(expected).max()
    rounding = 1e-2 if name == "bfloat16" else 3e-6
    np.testing.assert_allclose(logits, expected, rtol=0, atol=rounding * scale)
    # The test can fail: the net itself sees the padding.
    blind = alone(variables, np.where(np.abs(batch) < 5, batch, 0))
    assert np.abs(blind - expected)[:3].max() > 10 * rounding * scale


def test_maps_and_a_larger_canvas(images):
    model = create_model("resnet18", num_classes=5)
    variables = random_variables(model, X)
    sizes = np.array(SIZES, np.int32)
    apply = jax.jit(functools.partial(apply_masked, model, method="features"))
    alone = jax.jit(functools.partial(model.apply, method="features"))
    for canvas in ((64, 64), (96, 160)):
        maps = apply(variables, padded_batch(images, *canvas), sizes)
        for index, image in enumerate(images):
            for found, own in zip(maps, alone(variables, image[None]), strict=True):
                height, width = sizes_of_map(sizes, found.stride)[index]
                assert own.shape[1:3] == (height, width)
                np.testing.assert_allclose(
                    found.array[index, :height, :width],
                    own.array[0],
                    rtol=0,
                    atol=5e-6 * np.abs(own.array).max(),
                )


def test_a_canvas_that_strides_do_not_divide(images):
    model = create_model("resnet18", num_classes=5)
    variables = random_variables(model, X)
    with pytest.raises(ValueError, match="multiples of the net's stride"):
        apply_masked(
            model, variables, jnp.zeros((1, 72, 64, 3)), np.array([[60, 60]], np.int32)
        )
