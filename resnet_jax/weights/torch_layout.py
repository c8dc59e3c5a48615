"""The names and axes with which torchvision and timm store models.

``torch_layout`` is one table for both directions: for each array of a model, its key in
torch's state dict and the permutation of its axes. Kernels (height, width, in, out) are
(out, in, height, width) in torch; those of dense layers, (in, out), are (out, in).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from resnet_jax.errors import UserError
from resnet_jax.models.blocks import (
    BasicBlock,
    BottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
)
from resnet_jax.models.factories import class_of
from resnet_jax.models.norm import BatchNorm
from resnet_jax.models.resnet import CifarStem, DeepStem, ImageNetStem, ResNet
from resnet_jax.models.shortcuts import NoShortcut, Projection, ZeroPad
from resnet_jax.models.stages import Stage
from resnet_jax.models.vgg import POOLED_SIZE, VGG

COUNTER = "num_batches_tracked"
"""Last part of the keys of torch's batch counters, which we do not need."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """How a file stores an array of a model.

    Attributes:
      key: name in the file.
      shape: of the stored array.
      net_shape: of the model's array.
      split: ``net_shape`` with an axis split in several, if they move separately.
      axes: axes of ``split`` in the order of the file.
    """

    key: str
    shape: tuple[int, ...]
    net_shape: tuple[int, ...]
    split: tuple[int, ...]
    axes: tuple[int, ...]

    @classmethod
    def unchanged(cls, key: str, shape: tuple[int, ...]) -> "StoredArray":
        """An array that the file stores as the model has it."""
        return cls(key, shape, shape, shape, tuple(range(len(shape))))

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """The model's array in the file's form, C-contiguous."""
        moved = array.reshape(self.split).transpose(self.axes)
        return np.asarray(moved.reshape(self.shape), order="C")

    def from_file(self, array: np.ndarray) -> np.ndarray:
        """The file's array in the model's form, C-contiguous."""
        split = array.reshape([self.split[axis] for axis in self.axes])
        back = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return np.asarray(split.transpose(back).reshape(self.net_shape), order="C")


def torch_layout(model: nn.Module, arrays: Mapping[str, Any]) -> dict[str, StoredArray]:
    """How torch stores a model's arrays, by their flat names; without ``counters``.

    Running variances are equal in both layouts: torch averages the unbiased variance,
    as our BatchNorm does.

    Args:
      model: one with torch's order of layers.
      arrays: all of its arrays, or their shapes, by flat name.

    Raises:
      UserError: torchvision and timm have no such model.
    """
    _refuse_foreign(model)
    return {
        name: _stored(model, name, tuple(array.shape)) for name, array in arrays.items()
    }


def torch_module(model: nn.Module, path: str) -> str | None:
    """A layer's name in torch: "layer1.0.conv2" for "stage1/block1/conv2".

    None if torchvision and timm have no such layer.
    """
    if isinstance(model, VGG):
        return _vgg_modules(model).get(path)
    return _resnet_module(model, path) if isinstance(model, ResNet) else None


def counters(layout: Mapping[str, StoredArray]) -> dict[str, np.ndarray]:
    """Counters, all 0, of the batches that torch's normalisations have seen.

    Only ``momentum=None`` uses them, but ``load_state_dict`` requires them.
    """
    norms = [
        array.key.removesuffix("running_mean")
        for array in layout.values()
        if array.key.endswith(".running_mean")
    ]
    return {f"{norm}{COUNTER}": np.zeros((), np.int64) for norm in norms}


_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}

# In torch, DeepStem is a Sequential of convolutions, normalisations and ReLUs, without
# its last normalisation.
_STEM_AND_HEAD = {
    "stem/conv": "conv1",
    "stem/norm": "bn1",
    "stem/conv1": "conv1.0",
    "stem/norm1": "conv1.1",
    "stem/conv2": "conv1.3",
    "stem/norm2": "conv1.4",
    "stem/conv3": "conv1.6",
    "stem/norm3": "bn1",
    "head": "fc",
}
_SQUEEZE_EXCITE = {"squeeze_excite/reduce": "se.fc1", "squeeze_excite/expand": "se.fc2"}


def _stored(model: nn.Module, name: str, shape: tuple[int, ...]) -> StoredArray:
    collection, *modules, leaf = name.split("/")
    path = "/".join(modules)
    module, last = torch_module(model, path), _LEAVES.get((collection, leaf))
    if module is None or last is None:
        raise UserError(
            f"torchvision and timm have no array like {name}, so there is no torch "
            "layout for it; use the flax layout"
        )
    key = f"{module}.{last}"
    if leaf != "kernel":
        return StoredArray.unchanged(key, shape)
    if len(shape) == 4:
        height, width, ins, outs = shape
        return StoredArray(key, (outs, ins, height, width), shape, shape, (3, 2, 0, 1))
    ins, outs = shape
    if path == "fc1":
        # Its input is the flattened pooled map, with channels first in torch.
        split = (POOLED_SIZE, POOLED_SIZE, ins // POOLED_SIZE**2, outs)
        return StoredArray(key, (outs, ins), shape, split, (3, 2, 0, 1))
    # The dense layers of squeeze-and-excitation are 1x1 convolutions in timm.
    extra = (1, 1) if "/squeeze_excite/" in path else ()
    return StoredArray(key, (outs, ins, *extra), shape, shape, (1, 0))


def _refuse_foreign(model: nn.Module) -> None:
    """Raises UserError for a model that torchvision and timm cannot express."""
    odd = []
    if type(model) is ResNet:
        blocks = (BasicBlock, BottleneckBlock, PreActBasicBlock, PreActBottleneckBlock)
        known = {
            "stem": (model.stem, (ImageNetStem, DeepStem, CifarStem)),
            "stage": (model.stage, (Stage,)),
            "block": (model.block, blocks),
            "shortcut": (type(model.shortcut), (Projection, ZeroPad, NoShortcut)),
        }
        odd = [
            f"with the {part} {class_of(factory).__name__}"
            for part, (factory, classes) in known.items()
            if class_of(factory) not in classes
        ]
        if model.preactivation:
            odd.append("with pre-activation")
        if class_of(model.norm) is not BatchNorm:
            odd.append("without normalisation")
    elif type(model) is not VGG:
        odd.append(f"like {type(model).__name__}")
    if odd:
        raise UserError(
            f"torchvision and timm have no net {' and '.join(odd)}, so there is no "
            "torch layout for it; use the flax layout"
        )


def _resnet_module(model: ResNet, path: str) -> str | None:
    match = re.fullmatch(r"stage(\d+)/block(\d+)/(.+)", path)
    if match is None:
        return _STEM_AND_HEAD.get(path)
    layer = _block_module(model, match[3])
    return layer and f"layer{match[1]}.{int(match[2]) - 1}.{layer}"


def _block_module(model: ResNet, path: str) -> str | None:
    # In torch, the Sequential of a pooled shortcut begins with the pooling.
    first = 1 if getattr(model.shortcut, "pooled", False) else 0
    if path == "shortcut_conv":
        return f"downsample.{first}"
    if path == "shortcut_norm":
        return f"downsample.{first + 1}"
    if match := re.fullmatch(r"(conv|norm)(\d+)", path):
        return f"{'conv' if match[1] == 'conv' else 'bn'}{match[2]}"
    return _SQUEEZE_EXCITE.get(path)


def _vgg_modules(model: VGG) -> dict[str, str]:
    """Torch's names by ours. torch numbers the layers, ReLUs and poolings included."""
    names = {"fc1": "classifier.0", "fc2": "classifier.3", "head": "classifier.6"}
    number = 0
    for stage, size in enumerate(model.stage_convs, start=1):
        for index in range(1, size + 1):
            names[f"stage{stage}/conv{index}"] = f"features.{number}"
            if model.batch_norm:
                names[f"stage{stage}/norm{index}"] = f"features.{number + 1}"
            number += 3 if model.batch_norm else 2
        number += 1
    return names
