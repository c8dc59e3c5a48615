"""Nets, losses and augmentation under jax's strict settings."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.config.schema import AugmentationConfig, LossConfig
from resnet_jax.data.transforms import PixelStatistics, augment_and_mix, mixed_targets
from resnet_jax.models import VGG, create_model, fold_batch_norm
from resnet_jax.models.statistics import add_batch
from resnet_jax.training.losses import training_loss

STRICT = {"numpy_rank_promotion": "raise", "numpy_dtype_promotion": "strict"}
REGULARIZED = {"squeeze_excite": True, "stochastic_depth_rate": 0.3}
NETS = {
    "cifar": ("cifar_resnet8", {}),
    "regularised": ("cifar_resnet8_b", REGULARIZED),
    "ghost": ("cifar_resnet8", {"batch_norm_groups": 2}),
    "automatic": ("resnet10t", {"fused_norm": False, "zero_init_last": True}),
    "preactivation": ("cifar_preact_bottleneck_resnet11", {"dropout_rate": 0.2}),
    "scanned": ("cifar_resnet14", {"scan": True, "remat": True}),
    "imagenet": ("resnet18", {}),
    "gated": ("cifar_resnet8", {"shortcut": "exclusive_gate"}),
    "dropped": ("cifar_plain8", {"shortcut": "dropout"}),
    "without norm": ("cifar_resnet8", {"normalization": "none"}),
    "highway": ("cifar_highway19", {}),
    "mlp": ("mnist_highway10", {}),
}
SMALL_VGG = {
    "stage_convs": (2, 2, 2, 1, 1),
    "widths": (32, 64, 32, 32, 32),
    "hidden_features": 16,
    "num_classes": 10,
}


@contextlib.contextmanager
def settings(**values):
    before = {name: getattr(jax.config, f"jax_{name}") for name in values}
    try:
        for name, value in values.items():
            jax.config.update(f"jax_{name}", value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(f"jax_{name}", value)


def net(name, dtype=jnp.float32):
    if name == "vgg":
        return VGG(dtype=dtype, batch_norm=True, **SMALL_VGG)
    catalog_name, options = NETS[name]
    return create_model(catalog_name, dtype=dtype, **options)


def images(batch=4, side=32):
    values = np.random.default_rng(0).normal(size=(batch, side, side, 3))
    return jnp.asarray(values, jnp.float32)


def training_gradient(model, variables, x):
    def loss(params):
        logits, _ = model.apply(
            {**variables, "params": params},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(2)},
        )
        labels = jnp.arange(len(x), dtype=jnp.int32)
        return training_loss(LossConfig(label_smoothing=0.1), logits, labels).sum()

    return jax.grad(loss)(variables["params"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", [*NETS, "vgg"])
def test_nothing_is_promoted_implicitly(name, dtype):
    def program():
        model, x = net(name, dtype), images()
        variables = dict(model.init(jax.random.key(1), x, train=False))
        logits = model.apply(variables, x, train=False)
        return logits, training_gradient(model, variables, x)

    with settings(**STRICT):
        logits, _ = jax.eval_shape(program)
    assert logits.dtype == jnp.float32


def test_nor_in_statistics_and_folding():
    def program():
        model, x = net("cifar"), images()
        variables = dict(model.init(jax.random.key(1), x, train=False))
        folded = fold_batch_norm(model, variables)[1]
        return add_batch(model, variables, 1, x), folded

    with settings(**STRICT):
        jax.eval_shape(program)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nor_in_losses(kind, dtype, mixed, smoothing):
    config = LossConfig(kind=kind, label_smoothing=smoothing)

    def program(logits, labels, share):
        targets = mixed_targets(labels, share, 10) if mixed else labels
        return training_loss(config, logits, targets)

    given = (jnp.zeros((6, 10), dtype), jnp.zeros(6, jnp.int32), jnp.float32(0.3))
    with settings(**STRICT):
        assert jax.eval_shape(program, *given).dtype == jnp.float32


@pytest.mark.parametrize(
    "options",
    [
        {"flip": True, "pad": 2},
        {"color_jitter": (0.4, 0.4, 0.4), "color_noise": 0.1},
        {"erasing_probability": 0.5},
        {"mixup_alpha": 0.4},
        {"cutmix_alpha": 1.0},
        {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 3), (16, 16, 3)])
def test_nor_in_augmentation(options, shape):
    def program(key, pixels, mean, std):
        config = AugmentationConfig(**options)
        return augment_and_mix(key, pixels, PixelStatistics(mean, std), config)[0]

    pixels = jnp.zeros((6, 16, 16, 3), jnp.uint8)
    with settings(**STRICT):
        found = jax.eval_shape(
            program, jax.random.key(0), pixels, jnp.zeros(shape), jnp.ones(shape)
        )
    assert found.dtype == jnp.float32


@pytest.mark.parametrize("setting", ["enable_x64", "debug_nans"])
@pytest.mark.parametrize("name", ["cifar", "regularised"])
def test_with_64_bits_and_searched_for_nan_the_numbers_are_the_same(name, setting):
    model, x = net(name), images(2)
    variables = jax.jit(model.init)(jax.random.key(1), x)

    def program(variables, x):
        gradient = training_gradient(model, variables, x)
        return model.apply(variables, x, train=False), gradient

    expected = jax.jit(program)(variables, x)
    with settings(**{setting: True}):
        found = jax.jit(program)(variables, x)
    assert jax.tree.all(jax.tree.map(lambda leaf: leaf.dtype == jnp.float32, found))
    if setting == "debug_nans":
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    else:
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)
