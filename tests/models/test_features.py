"""Maps with a name and a stride, through JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.models import CifarStem, FeatureMap, ResNet, create_model
from tests.models.reference import double_precision, random_variables


@pytest.fixture
def feature_map():
    array = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3)
    return FeatureMap(array, "C4", 16)


def test_a_map_is_a_pytree_of_its_array(feature_map):
    assert feature_map.shape == (2, 2, 2, 3)
    [leaf], structure = jax.tree.flatten(feature_map)
    assert leaf is feature_map.array
    again = jax.tree.unflatten(structure, [leaf])
    assert again.array is leaf
    assert (again.name, again.stride) == (feature_map.name, feature_map.stride)
    doubled = jax.tree.map(lambda a: 2 * a, feature_map)
    assert (doubled.name, doubled.stride) == ("C4", 16)
    np.testing.assert_array_equal(doubled.array, 2 * feature_map.array)


def test_jit_takes_and_returns_maps_and_their_names_are_static(feature_map):
    traced = []

    @jax.jit
    def halve(m):
        traced.append((m.name, m.stride, m.shape))
        return m.replace(array=m.array / m.stride, stride=m.stride // 2)

    result = halve(feature_map)
    assert (result.name, result.stride) == ("C4", 8)
    np.testing.assert_array_equal(result.array, feature_map.array / 16)
    halve(feature_map)
    halve(feature_map.replace(name="C5"))  # another name is another program
    assert traced == [("C4", 16, (2, 2, 2, 3)), ("C5", 16, (2, 2, 2, 3))]


def test_grad_with_respect_to_a_map(feature_map):
    gradient = jax.grad(lambda m: jnp.sum(m.array**2) / m.stride)(feature_map)
    assert isinstance(gradient, FeatureMap)
    assert (gradient.name, gradient.stride) == ("C4", 16)
    np.testing.assert_allclose(gradient.array, feature_map.array / 8)


def test_vmap_over_maps(feature_map):
    batch = jax.tree.map(lambda a: np.stack([a, -a]), feature_map)
    result = jax.vmap(lambda m: m.replace(array=m.array[0].sum(0)))(batch)
    assert (result.name, result.stride) == ("C4", 16)
    assert result.shape == (2, 2, 3)
    expected = feature_map.array[0].sum(0)
    np.testing.assert_array_equal(result.array, np.stack([expected, -expected]))


def test_maps_of_a_net_through_jit_grad_and_vmap():
    model = ResNet((1, 1), stem=CifarStem, width=4, dtype=jnp.float64)
    rng = np.random.default_rng(0)
    images, direction = rng.normal(size=(2, 2, 6, 6, 3))
    with double_precision():
        variables = random_variables(model, images, dtype=np.float64)

    def maps(images):
        return model.apply(variables, images, method="features")

    def means(images):
        return jnp.stack([jnp.mean(m.array) for m in maps(images)])

    with double_precision():
        alone = jax.jit(maps)(images[:1])
        together = jax.jit(jax.vmap(maps))(images[:, None])
        # The slope along a direction, backwards and by a difference.
        step = 1e-6 * direction
        value = jax.jit(means)
        difference = (value(images + step) - value(images - step)) / 2
        slopes = jax.jit(jax.jacrev(means))(images) * step
    assert [(m.name, m.stride) for m in together] == [("C1", 1), ("C2", 1), ("C3", 2)]
    sizes = [(2, 1, 6, 6, 4), (2, 1, 6, 6, 4), (2, 1, 3, 3, 8)]
    assert [m.shape for m in together] == sizes
    for ours, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours.array[0], expected.array, atol=1e-12)
    slopes = np.asarray(slopes).sum((1, 2, 3, 4))
    assert np.abs(slopes).min() > 1e-9
    np.testing.assert_allclose(difference, slopes, rtol=1e-5)


@pytest.mark.parametrize("method", [None, "features"])
@pytest.mark.parametrize("name", ["cifar_resnet8", "vgg16", "cifar_highway19"])
@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((32, 32, 3), r"not \(32, 32, 3\); for one image, images\[None\]"),
        ((2, 3, 32, 32), r"channels before height and width: transpose them"),
        ((2, 1024), r"shape \(n, height, width, channels\), not \(2, 1024\)"),
    ],
)
def test_images_of_another_layout_get_a_sentence(name, shape, sentence, method):
    init = functools.partial(create_model(name).init, method=method)
    with pytest.raises(UserError, match=sentence):
        jax.eval_shape(init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 32, 8), (1, 1, 16, 6)])
def test_low_images_of_many_channels_are_images(shape):
    model = create_model("cifar_resnet8")
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
