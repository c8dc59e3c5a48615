"""scikit-learn's handwritten digits as a tfds data set: small, real, offline.

1,797 grey images of 8x8 pixels from 13 writers (Alpaydin & Kaynak 1998). The split is
fixed and stratified by class: 1,437 for training and 360 for testing, by the same
writers.
"""

import io

import cv2
import numpy as np
import tensorflow_datasets as tfds

from resnet_jax.environment import how_to_install
from resnet_jax.errors import UserError

_BRIGHTEST = 16  # a pixel counts the set bits in a 4x4 cell
_TEST_SHARE = 5  # one in five is a test image


def is_test_image(labels: np.ndarray) -> np.ndarray:
    """Marks the test images: every fifth of a random order within each class."""
    words = np.random.Philox(key=[0, 0]).random_raw(len(labels))
    order = np.lexsort((words, labels))
    chosen = np.zeros(len(labels), bool)
    chosen[order[::_TEST_SHARE]] = True
    return chosen


class Digits(tfds.core.GeneratorBasedBuilder):
    """The digits as PNG in ArrayRecord, prepared without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "1,437 training and 360 test images."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(8, 8, 1), encoding_format="png"
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing is downloaded
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError(
                f"the digits need scikit-learn: {how_to_install('demo')}"
            ) from None
        digits = load_digits()
        images = np.rint(digits.images * (255 / _BRIGHTEST)).astype(np.uint8)
        test = is_test_image(digits.target)
        return {
            "train": self._generate_examples(images[~test], digits.target[~test]),
            "test": self._generate_examples(images[test], digits.target[test]),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            _, png = cv2.imencode(".png", image)
            yield index, {"image": io.BytesIO(png.tobytes()), "label": int(label)}
