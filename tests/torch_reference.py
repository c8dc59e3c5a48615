"""The paper's nets in torch, written from its definition, to compare ours with.

Parameters bear torchvision's names (``conv1``, ``layer1.0.bn2``,
``layer2.0.downsample.0``, ``fc``), and maps are NCHW.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flax import traverse_util
from torch import nn


class ZeroPadShortcut(nn.Module):
    """Option A: every ``stride``-th pixel, and zeros for the channels that are new."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x):
        kept = x[:, :, :: self.stride, :: self.stride]
        n, _, height, width = kept.shape
        return torch.cat([kept, kept.new_zeros(n, self.new_channels, height, width)], 1)


class Block(nn.Module):
    """y = F(x) + shortcut(x), then ReLU, with F of two or of three convolutions.

    ``layers`` lists F's convolutions as (kernel size, channels, stride).
    """

    def __init__(
        self, in_channels: int, layers: list[tuple[int, int, int]], shortcut: str
    ):
        super().__init__()
        channels, strides = in_channels, 1
        for index, (size, features, stride) in enumerate(layers, start=1):
            conv = nn.Conv2d(
                channels, features, size, stride, padding=(size - 1) // 2, bias=False
            )
            self.add_module(f"conv{index}", conv)
            self.add_module(f"bn{index}", nn.BatchNorm2d(features))
            channels, strides = features, strides * stride
        self.depth = len(layers)
        self.plain = shortcut == "none"
        self.downsample = None
        changes = strides != 1 or channels != in_channels
        if shortcut == "C" or (shortcut == "B" and changes):
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, strides, bias=False),
                nn.BatchNorm2d(channels),
            )
        elif shortcut == "A" and changes:
            self.downsample = ZeroPadShortcut(in_channels, channels, strides)

    def forward(self, x):
        y = x
        for index in range(1, self.depth + 1):
            y = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(y))
            if index < self.depth:
                y = torch.relu(y)
        if not self.plain:
            y = y + (x if self.downsample is None else self.downsample(x))
        return torch.relu(y)


class TorchResNet(nn.Module):
    """Table 1's nets ("imagenet" stem, width 64) and section 4.2's ("cifar", 16)."""

    def __init__(
        self,
        stage_sizes: tuple[int, ...],
        *,
        stem: str,
        bottleneck: bool = False,
        shortcut: str = "B",
        stride_version: str = "v1.5",
        num_classes: int = 1000,
    ):
        super().__init__()
        width = {"imagenet": 64, "cifar": 16}[stem]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = len(stage_sizes)
        channels = width
        for stage, size in enumerate(stage_sizes, start=1):
            blocks = []
            for index in range(size):
                stride = 2 if stage > 1 and index == 0 else 1
                if not bottleneck:
                    layers = [(3, width, stride), (3, width, 1)]
                elif stride_version == "v1":
                    layers = [(1, width, stride), (3, width, 1), (1, 4 * width, 1)]
                else:
                    layers = [(1, width, 1), (3, width, stride), (1, 4 * width, 1)]
                blocks.append(Block(channels, layers, shortcut))
                channels = layers[-1][1]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            width *= 2
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


_LEAF_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _torch_name(path: tuple[str, ...]) -> str:
    *modules, leaf = path
    name = ".".join([*modules, _LEAF_NAMES[leaf]])
    name = re.sub(r"^stem\.conv", "conv1", name)
    name = re.sub(r"^stem\.norm", "bn1", name)
    name = re.sub(r"^head", "fc", name)
    name = re.sub(
        r"^stage(\d+)\.block(\d+)", lambda m: f"layer{m[1]}.{int(m[2]) - 1}", name
    )
    name = re.sub(r"\.norm(\d)", r".bn\1", name)
    name = name.replace("shortcut_conv", "downsample.0")
    return name.replace("shortcut_norm", "downsample.1")


def to_state_dict(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Flax collections ``params`` and ``batch_stats`` under torch's names and axes.

    HWIO kernels become OIHW, and the classifier's (in, out) becomes (out, in). Works
    for gradients as well.
    """
    state = {}
    for collection in variables.values():
        for path, value in traverse_util.flatten_dict(dict(collection)).items():
            array = np.asarray(value)
            if path[-1] == "kernel":
                array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
            name = _torch_name(path)
            assert name not in state, f"two variables would be {name}"
            state[name] = array
    return state


def load_variables(net: TorchResNet, variables: Mapping[str, Any]) -> None:
    """Copies Flax variables into ``net``; each must have its one counterpart."""
    dtype = net.fc.weight.dtype
    state = {
        name: torch.from_numpy(array.copy()).to(dtype)
        for name, array in to_state_dict(variables).items()
    }
    counters = {
        name: value
        for name, value in net.state_dict().items()
        if name.endswith("num_batches_tracked")
    }
    net.load_state_dict(state | counters, strict=True)
