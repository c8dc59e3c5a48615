"""The public names of ``resnet_jax.detection``."""

import pytest

from resnet_jax import detection
from resnet_jax.config import DetectionConfig, resolve
from resnet_jax.config.detection import DetectionTrainingConfig
from resnet_jax.errors import UserError
from tests.conftest import REPOSITORY
from tests.test_imports import HEAVY, run_without


def test_the_names_are_there():
    own = {"load_config", "default_config"}
    assert set(detection.__all__) == set(detection._LAZY) | own == set(dir(detection))
    for name in detection.__all__:
        assert callable(getattr(detection, name))
        assert getattr(detection, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'trian_detector'"):
        _ = detection.trian_detector


def test_the_import_needs_no_jax():
    run_without(
        ("jax", "jaxlib", "flax", *(set(HEAVY) - {"ml_collections"})),
        "from resnet_jax import detection\ndetection.default_config()\n",
    )


def test_configs_have_the_schema_of_detectors():
    config = detection.load_config("detection/bccd", {"detector.nms": "0.4"})
    assert isinstance(config, DetectionConfig)
    assert (config.data.name, config.detector.nms) == ("BCCD", 0.4)
    changed = detection.default_config()
    changed.training.steps = 5
    training = DetectionTrainingConfig(steps=5)
    assert resolve(changed, DetectionConfig) == DetectionConfig(training=training)
    with pytest.raises(UserError, match="the config of a classifier"):
        detection.load_config("digits")


def test_every_folder_of_configs_is_in_the_wheel():
    setup = (REPOSITORY / "setup.py").read_text()
    for file in (REPOSITORY / "configs").rglob("*.py"):
        folder = file.parent.relative_to(REPOSITORY).as_posix()
        package = f"resnet_jax.{folder.replace('/', '.')}"
        assert f'"{package}": "{folder}"' in setup
        assert setup.count(f'"{package}"') == 2
