"""Runs that start from published weights, and the pixels that these expect."""

import json

import jax
import numpy as np
import pytest

import resnet_jax
from resnet_jax.analysis.complexity import abstract_variables
from resnet_jax.config import resolve
from resnet_jax.data.dataset import open_dataset
from resnet_jax.errors import UserError
from resnet_jax.evaluation.protocols import Stored
from resnet_jax.training.pretrained import pixel_statistics

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@pytest.fixture
def fine_tuning(tiny_config, image_folder):
    tiny_config.data.path, tiny_config.data.image_size = str(image_folder), 8
    tiny_config.data.normalization = "weights"
    tiny_config.augmentation.pad = 0
    tiny_config.model.new_head = True
    tiny_config.training.steps, tiny_config.training.global_batch_size = 2, 8
    return tiny_config


@pytest.fixture
def write_weights(tmp_path):
    def write(mean=None, std=None, channels=3, name="cifar_resnet8"):
        model = resnet_jax.create_model(name)
        shapes = abstract_variables(model, (8, 8, channels))
        variables = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
        content = {"mean": mean, "std": std, "protocol": Stored().to_json()}
        metadata = {"preprocessing": json.dumps(content)} if mean else None
        file = tmp_path / f"{name}.safetensors"
        resnet_jax.save_weights(file, variables, model, name=name, metadata=metadata)
        return str(file)

    return write


def pixels(config):
    warnings: list[str] = []
    config = resolve(config)
    found = pixel_statistics(config, open_dataset(config), warnings.append)
    return np.ravel(found.mean), np.ravel(found.std), warnings


def test_a_run_takes_the_pixels_of_its_weights(
    fine_tuning, write_weights, tmp_path, console
):
    fine_tuning.model.weights = write_weights(MEAN, STD)
    resnet_jax.train(fine_tuning, tmp_path / "run", console)
    statistics = resnet_jax.load_run(tmp_path / "run").statistics
    np.testing.assert_allclose(np.ravel(statistics.mean), MEAN, rtol=1e-6)
    np.testing.assert_allclose(np.ravel(statistics.std), STD, rtol=1e-6)
    assert "warning" not in console.file.getvalue()
    shown = resnet_jax.show_data(fine_tuning, split="test")
    expected = (shown.pixels / 255 - MEAN) / STD
    np.testing.assert_allclose(shown.images, expected, atol=1e-5)


def test_a_mean_image_counts_by_its_average(fine_tuning, write_weights):
    """It fits images of its own size alone."""
    image = np.random.default_rng(0).uniform(size=(5, 5, 3))
    weights = write_weights(image.tolist(), np.ones((5, 5, 3)).tolist())
    fine_tuning.model.weights = weights
    mean, std, _ = pixels(fine_tuning)
    np.testing.assert_allclose(mean, image.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(std, np.ones(3))


def test_other_pixels_get_a_warning(fine_tuning, write_weights):
    fine_tuning.data.normalization = "per_channel"
    fine_tuning.model.weights = write_weights(MEAN, STD)
    *found, warnings = pixels(fine_tuning)
    assert len(warnings) == 1
    assert "trained on pixels of mean 0.5, 0.4, 0.3 and deviation 0.2" in warnings[0]
    fine_tuning.model.weights = write_weights(*(x.tolist() for x in found))
    assert pixels(fine_tuning)[2] == []
    fine_tuning.model.weights = write_weights()
    assert pixels(fine_tuning)[2] == []


@pytest.mark.parametrize(
    ("channels", "known", "sentence"),
    [
        (3, False, "does not say what pixels it expects"),
        (1, True, "expects 1-channel images, but these have 3"),
    ],
)
def test_weights_without_suitable_pixels_are_named(
    fine_tuning, write_weights, channels, known, sentence
):
    given = (MEAN[:channels], STD[:channels]) if known else (None, None)
    fine_tuning.model.weights = write_weights(*given, channels=channels)
    with pytest.raises(UserError, match=sentence):
        pixels(fine_tuning)


def test_the_pixels_of_weights_need_weights(tiny_config):
    tiny_config.data.normalization = "weights"
    with pytest.raises(UserError, match=r"weights needs model\.weights: set it too"):
        resolve(tiny_config)
