"""A small net, photographs, and the test protocols in torch."""

import io

import numpy as np
import pytest
from PIL import Image

from resnet_jax.data.sources import Example
from resnet_jax.data.transforms import PixelStatistics
from resnet_jax.evaluation.nets import TrainedNet
from resnet_jax.evaluation.protocols import Stored
from resnet_jax.models import ResNet
from tests.models.reference import random_variables

CLASSES, SIZE = 7, 64
MEAN, STD = np.float32([0.4, 0.5, 0.6]), np.float32([0.2, 0.25, 0.3])
SIDES = [(90, 70), (70, 131), (75, 75), (300, 71), (64, 100)]


def photograph(rng, width, height):
    """A smooth random image as JPEG bytes."""
    pixels = rng.integers(0, 255, (6, 6, 3), np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


class Photographs:
    class_names = tuple("abcdefg")
    channels = 3

    def __init__(self, broken=()):
        rng = np.random.default_rng(0)
        self.files = [photograph(rng, *side) for side in SIDES]
        for index in broken:
            self.files[index] = b"nothing"

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return Example(self.files[index], index % CLASSES, f"photo{index}.jpg")


def small_net(**fields):
    """A net of ``CLASSES`` for images of ``SIZE`` pixels."""
    model = ResNet((1, 1, 1, 1), width=8, num_classes=CLASSES)
    variables = random_variables(model, np.zeros((1, SIZE, SIZE, 3), np.float32))
    # Such that probabilities are neither 0 nor 1.
    variables["params"]["head"]["kernel"] /= 20
    values = {
        "source": "",
        "name": "",
        "options": {},
        "model": model,
        "variables": variables,
        "statistics": PixelStatistics(MEAN[None, None], STD[None, None]),
        "protocol": Stored(),
        "class_names": Photographs.class_names,
    }
    return TrainedNet(**values | fields)


class TorchProtocols:
    """The protocols in torch, an image at a time and without padding."""

    def __init__(self, net):
        torch = pytest.importorskip("torch")
        from tests.torch_reference import make_net

        self.torch = torch
        sizes = {"stage_sizes": (1, 1, 1, 1), "width": 8, "num_classes": CLASSES}
        self.module = make_net(net.variables, **sizes, stem="imagenet")
        self.module.eval()

    def logits(self, pixels, windows=None):
        torch = self.torch
        x = (pixels / 255.0 - MEAN) / STD
        x = torch.from_numpy(x.transpose(2, 0, 1)[None])
        with torch.no_grad():
            if windows is None:
                return self.module(x)
            maps = self.module.features(x)[-1]
            pooled = torch.nn.functional.avg_pool2d(maps, windows, 1)
            return self.module.fc(pooled.flatten(2)[0].T)

    def views(self, file, side, filters=Image.Resampling.BILINEAR):
        """The whole image, its five crops, and those of its mirror image."""
        image = Image.open(io.BytesIO(file)).convert("RGB")
        w, h = image.size
        size = (side, side * h // w) if w <= h else (side * w // h, side)
        whole = np.asarray(image.resize(size, filters))
        h, w = whole.shape[:2]
        top, left = round((h - SIZE) / 2), round((w - SIZE) / 2)
        places = [(0, 0), (0, w - SIZE), (h - SIZE, 0), (h - SIZE, w - SIZE)]
        places.append((top, left))
        return whole, [
            full[y : y + SIZE, x : x + SIZE]
            for full in (whole, whole[:, ::-1])
            for y, x in places
        ]

    def mean_softmax(self, logits):
        return self.torch.cat(logits).softmax(-1).mean(0).log().numpy()
