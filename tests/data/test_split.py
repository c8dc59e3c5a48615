import cv2
import numpy as np
import pytest

from resnet_jax.config import default_config, resolve
from resnet_jax.data.sources import Example
from resnet_jax.data.split import Split
from resnet_jax.errors import UserError


class OneImage:
    class_names, channels = ("a",), 3

    def __init__(self, height, width):
        image = np.zeros((height, width, 3), np.uint8)
        self.image = cv2.imencode(".png", image)[1].tobytes()

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return Example(self.image, 0, "some/file.png")


def split_of(source, **data):
    config = default_config()
    config.training.steps = 1
    config.data.update(data)
    return Split("train", source, resolve(config).data)


def test_the_limit_of_pixels_is_the_configs():
    assert split_of(OneImage(20, 30), max_image_pixels=600).image_shape == (20, 30, 3)
    with pytest.raises(UserError, match=r"some/file\.png .* max_image_pixels=599"):
        split_of(OneImage(20, 30), max_image_pixels=599)
    with pytest.raises(UserError, match=r"max_image_pixels must be from 1 to"):
        split_of(OneImage(20, 30), max_image_pixels=0)


def test_notes_of_the_source_reach_the_start_of_a_run():
    source = OneImage(4, 4)
    assert split_of(source).notes == ()
    source.notes = ("here: ignored 1 file: 1 .txt",)
    assert split_of(source).notes == source.notes


def test_a_line_of_pixels_is_not_resized_beyond_the_limit():
    line = OneImage(1, 40_000)
    split = split_of(line, image_size=64, normalization="none")
    with pytest.raises(
        UserError, match=r"some/file\.png is 40000 x 1: resized to a shorter side of 64"
    ):
        split.example(0)
    assert split_of(line, image_size=8).example(0)[0].shape == (8, 8, 3)
