"""Class activation maps against torch and their closed form."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.analysis.activation_maps import (
    class_activation_map,
    evidence,
    heat_over,
)
from resnet_jax.errors import UserError
from resnet_jax.evaluation.classifier import Classifier
from resnet_jax.evaluation.outputs import normalized
from resnet_jax.models import ResNet, create_model
from resnet_jax.models.blocks import PreActBasicBlock
from tests.evaluation.reference import MEAN, STD, TorchProtocols, small_net
from tests.models.reference import random_variables

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 96, 64, 3), np.uint8)
CLASSES = np.array([2, 0, 6])


@pytest.fixture(scope="module")
def net():
    return small_net()


def test_against_torch(net):
    reference = TorchProtocols(net)
    torch, module = reference.torch, reference.module
    x = torch.from_numpy((IMAGES / 255.0 - MEAN) / STD).movedim(-1, 1)
    with torch.no_grad():
        maps = module.features(x)[-1].numpy()
        expected = np.einsum("nchw,nc->nhw", maps, module.fc.weight.numpy()[CLASSES])
    found = class_activation_map(net, IMAGES, CLASSES)
    assert found.shape == (3, 3, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"block": PreActBasicBlock}])
def test_the_mean_of_a_map_and_the_bias_are_the_logit(net, options):
    model = ResNet((1, 1), width=4, num_classes=7, **options)
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32))
    tested = dataclasses.replace(net, model=model, variables=variables)
    found = class_activation_map(tested, IMAGES, CLASSES)
    bias = variables["params"]["head"]["bias"][CLASSES]
    pixels = normalized(jnp.asarray(IMAGES), net.statistics)
    logits = model.apply(variables, pixels)[np.arange(3), CLASSES]
    np.testing.assert_allclose(found.mean((1, 2)) + bias, logits, rtol=1e-4)


def test_nets_with_other_classifiers_are_refused(net):
    other = dataclasses.replace(net, name="vgg16", model=create_model("vgg16"))
    with pytest.raises(UserError, match="vgg16 has no class activation maps"):
        class_activation_map(other, IMAGES, CLASSES)


def test_colours_over_a_view():
    view = np.full((40, 20, 3), 100, np.uint8)
    heat = np.array([[1.0, -5.0], [0.0, 0.0]])
    found = heat_over(view, heat)
    assert found.shape == (160, 80, 3)
    assert found.dtype == np.uint8
    assert found[0, 0, 0] > found[0, 0, 1] > found[0, 0, 2]  # red
    np.testing.assert_array_equal(found[-1, 0], [100, 100, 100])
    np.testing.assert_array_equal(found[0, -1], [100, 100, 100])
    # Where nothing supports the class, the view is grey.
    np.testing.assert_array_equal(heat_over(view, -np.abs(heat)), 100)


def test_evidence_for_a_class_of_a_picture(net):
    classifier, picture = Classifier(net), IMAGES[0]
    likeliest = classifier(picture, top=1)[0].classes[0]
    view = net.sized_view.views(picture)[0]
    for label in (likeliest, (likeliest + 1) % 7):
        heat = np.asarray(class_activation_map(net, view[None], np.array([label]))[0])
        found = evidence(classifier, picture, label)
        np.testing.assert_array_equal(found, heat_over(view, heat))
    first = evidence(classifier, picture)
    np.testing.assert_array_equal(first, evidence(classifier, picture, likeliest))
