"""Small files in the place of those that the pages name: data, weights, runs."""

import json
import re
import shutil
import sys
import types

import cv2
import jax
import numpy as np

import resnet_jax
from resnet_jax.config import load_config
from resnet_jax.weights import hub
from tests.detection.layouts import write_voc

CLASSES = ("n01440764", "n01443537", "n01484850")
RUNS = {
    "runs/five": ("digits:cifar_resnet8", {"seeds": "2"}),
    "runs/resnet56": ("digits:cifar_plain8", {}),
}


def make_stand_ins(folder, small):
    """A folder with data/, runs/, weights and pictures.

    Args:
      folder: an empty one.
      small: overrides that make a run on the digits short.
    """
    images = np.random.default_rng(0)
    for kind, classes in (("mine", ("ant", "bee", "cat")), ("imagenet", CLASSES)):
        for split in ("train", "test" if kind == "mine" else "val"):
            for name in classes:
                place = folder / "data" / kind / split / name
                place.mkdir(parents=True)
                for index in range(4):
                    write_image(place / f"{index}.png", images)
    write_boxes(folder / "data" / "boxes")
    (folder / "pictures").mkdir()
    for name in ("cat.jpg", "dog.png", "pictures/1.jpg", "pictures/2.png"):
        write_image(folder / name, images)
    for name, (config, overrides) in RUNS.items():
        options = {**small, **overrides, "data.data_dir": str(folder / "tfds")}
        options["model.name"] = config.partition(":")[2]
        resnet_jax.train(load_config(config, options), folder / name)
    shutil.copytree(folder / "runs/five/seed-0", folder / "runs/digits")
    for name in ("resnet18", "cifar_resnet8"):
        model = resnet_jax.create_model(name, num_classes=1000)
        variables = random_variables(model)
        for file, layout in ((f"{name}.safetensors", "flax"), (f"{name}.pth", "torch")):
            # The content of a file decides its format, not its name.
            temporary = folder / f"{name}-{layout}.safetensors"
            resnet_jax.save_weights(
                temporary, variables, model, name=name, layout=layout
            )
            temporary.rename(folder / file)
    return folder


def write_boxes(root):
    """Rectangles in VOC's layout, with the lists trainval and test."""
    objects = [("wide", (4, 8, 44, 28)), ("tall", (60, 4, 80, 44))]
    for split in ("trainval", "test"):
        images = {f"{split}{index}": (96, 64, objects) for index in range(4)}
        write_voc(root, split, images)


def write_image(path, random, height=40, width=36):
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), pixels)


def random_variables(model):
    """Variables of a net, without compiling its initialisation."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 64, 64, 3)), train=False)
    )

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            scale = (2 / np.prod(leaf.shape[:-1])) ** 0.5
            return random.normal(0, scale, leaf.shape).astype(leaf.dtype)
        return (np.ones if name in ("scale", "var") else np.zeros)(
            leaf.shape, leaf.dtype
        )

    return jax.tree.map_with_path(fill, shapes)


def use_stand_ins(stand_ins, text, here, monkeypatch):
    """Puts into ``here`` what a page reads and does not make itself."""
    for name in ("data", "tfds"):
        (here / name).symlink_to(stand_ins / name)
    made = set(re.findall(r"train .*?--workdir (\S+)", text.replace("\\\n", "")))
    for run in ("runs/five", "runs/resnet56", "runs/digits"):
        if run in text and run not in made:
            shutil.copytree(stand_ins / run, here / run)
    for path in stand_ins.iterdir():
        if path.name not in ("data", "tfds", "runs"):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, here / path.name)
    monkeypatch.setattr(
        hub, "_from_torchvision", lambda name: here / f"{re.split('[:.]', name)[1]}.pth"
    )
    monkeypatch.setattr(hub, "_from_hub", lambda name, files: from_hub(here, files))
    monkeypatch.setitem(sys.modules, "torchvision", torchvision())


def from_hub(here, files):
    """timm's files of a repository, for the first of these names."""
    if files[0] != "config.json":
        return here / "resnet18.pth"
    config = here / "config.json"
    config.write_text(
        json.dumps(
            {
                "architecture": "resnet18",
                "num_classes": 1000,
                "pretrained_cfg": {
                    "input_size": [3, 64, 64],
                    "crop_pct": 0.875,
                    "interpolation": "bilinear",
                    "mean": [0.5, 0.5, 0.5],
                    "std": [0.5, 0.5, 0.5],
                },
            }
        )
    )
    return config


def torchvision():
    """torchvision's ResNet-18, or ours with its names if it cannot be imported."""

    def resnet18():
        from tests.torch_reference import TorchResNet

        return TorchResNet((2, 2, 2, 2), stem="imagenet")

    module = types.ModuleType("torchvision")
    module.models = types.SimpleNamespace(resnet18=resnet18)
    return module
