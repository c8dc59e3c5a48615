"""Residual nets in torch, written from their definitions, to compare ours with.

Parameters bear torchvision's names (``conv1``, ``layer1.0.bn2``,
``layer2.0.downsample.0``, ``fc``); a stem of three convolutions and the gates have
timm's (``conv1.3``, ``layer1.0.se.fc1``). Maps are NCHW.
"""

import contextlib
import re
from collections import OrderedDict
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


class DilatedMean(nn.Module):
    """Means of 2x2 pixels that lie ``dilation`` apart, of those within the map."""

    def __init__(self, dilation: int):
        super().__init__()
        self.dilation = dilation

    def forward(self, x):
        reach = self.dilation
        padded = nn.functional.pad(x, (0, reach, 0, reach), value=float("nan"))
        height, width = x.shape[2:]
        corners = [
            padded[:, :, top : top + height, left : left + width]
            for top in (0, reach)
            for left in (0, reach)
        ]
        return torch.stack(corners).nanmean(0)


class SqueezeExcite(nn.Module):
    """Every channel times a gate: sigmoid(W2 relu(W1 means)).

    The hidden layer has a sixteenth of the channels, rounded to a multiple of eight.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(8, 8 * ((channels // 16 + 4) // 8))
        self.fc1 = nn.Linear(channels, hidden)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x):
        gate = self.fc2(self.relu(self.fc1(x.mean((2, 3)))))
        return x * torch.sigmoid(gate)[:, :, None, None]


class Block(nn.Module):
    """y = relu(F(x) + shortcut(x)), F of two or of three convolutions.

    Args:
      in_channels: of x.
      convs: F's convolutions: (kernel size, channels, stride, dilation, groups).
      shortcut: "A", "B", "C", "none", or "pooled" (B behind an average pooling).
      mean: the distance between the pixels that "pooled" averages where the block has
        no stride; 0: it averages none.
      squeeze_excite: whether F's output is gated.
      preactivation: F is (norm, relu, conv), nothing follows the sum, and projections
        are bare convolutions.
      first: of the net's blocks ("net") or of the stage's ("stage"). With
        pre-activation the former is given an activated map, so that its F begins with
        a convolution, and the latter's shortcut leaves behind F's first ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        convs: list[tuple[int, int, int, int, int]],
        *,
        shortcut: str,
        mean: int = 0,
        squeeze_excite: bool = False,
        preactivation: bool = False,
        first: str = "",
    ):
        super().__init__()
        self.depth = len(convs)
        self.plain = shortcut == "none"
        self.preactivation = preactivation
        self.first = first
        channels, strides = in_channels, 1
        for index, (size, features, stride, dilation, groups) in enumerate(convs, 1):
            conv = nn.Conv2d(
                channels,
                features,
                size,
                stride,
                padding=dilation * (size - 1) // 2,
                dilation=dilation,
                groups=groups,
                bias=False,
            )
            self.add_module(f"conv{index}", conv)
            normalized = channels if preactivation else features
            if not (preactivation and first == "net" and index == 1):
                self.add_module(f"bn{index}", nn.BatchNorm2d(normalized))
            self.add_module(f"relu{index}", nn.ReLU())
            channels, strides = features, strides * stride
        self.se = SqueezeExcite(channels) if squeeze_excite else nn.Identity()
        self.downsample = self._downsample(
            in_channels, channels, strides, shortcut, mean
        )

    def _downsample(self, in_channels, channels, stride, shortcut, mean):
        changes = stride != 1 or channels != in_channels
        if shortcut == "none" or not (changes or shortcut == "C"):
            return None
        if shortcut == "A":
            return ZeroPadShortcut(in_channels, channels, stride)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if shortcut == "pooled":
            if stride == 2:
                # Windows beyond the border average the pixels that there are.
                layers["pool"] = nn.AvgPool2d(
                    2, 2, ceil_mode=True, count_include_pad=False
                )
            elif mean:
                layers["pool"] = DilatedMean(mean)
            stride = 1
        layers["0"] = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        if not self.preactivation:
            layers["1"] = nn.BatchNorm2d(channels)
        return nn.Sequential(layers)

    def forward(self, x):
        y, leaves = x, x
        for index in range(1, self.depth + 1):
            conv, relu = getattr(self, f"conv{index}"), getattr(self, f"relu{index}")
            norm = getattr(self, f"bn{index}", None)
            if self.preactivation:
                if norm is not None:
                    y = relu(norm(y))
                if index == 1 and self.first == "stage":
                    leaves = y
                y = conv(y)
            else:
                y = norm(conv(y))
                if index < self.depth:
                    y = relu(y)
        y = self.se(y)
        if not self.plain:
            y = y + (leaves if self.downsample is None else self.downsample(leaves))
        return y if self.preactivation else relu(y)


class TorchResNet(nn.Module):
    """Residual and plain nets of He et al. 2015 and 2016, and of those after them.

    Args:
      stage_sizes: blocks in each stage.
      stem: "imagenet" (7x7 and max-pooling), "deep" (three 3x3 and max-pooling) or
        "cifar" (3x3).
      bottleneck: three convolutions a block in place of two.
      shortcut, squeeze_excite, preactivation: see ``Block``.
      stride_version: "v1" strides a bottleneck's first 1x1, "v1.5" its 3x3.
      groups, base_width: a bottleneck's 3x3 has ``groups`` groups, each of
        ``base_width`` channels in the stage of 64 (ResNeXt's "32x4d", wide nets' 128).
      width: channels of the first stage; 64, of a "cifar" stem 16.
      stem_width: channels of the stem, if others than ``width``.
      output_stride: pixels between neighbours on the last map; where a stage would
        pass it, taps spread instead (Chen et al. 2017, Yu et al. 2017).
      num_classes: rows of the classifier.
    """

    def __init__(
        self,
        stage_sizes: tuple[int, ...],
        *,
        stem: str,
        bottleneck: bool = False,
        shortcut: str = "B",
        stride_version: str = "v1.5",
        groups: int = 1,
        base_width: int = 64,
        squeeze_excite: bool = False,
        preactivation: bool = False,
        width: int | None = None,
        stem_width: int | None = None,
        output_stride: int | None = None,
        num_classes: int = 1000,
    ):
        super().__init__()
        width = width or (16 if stem == "cifar" else 64)
        channels = stem_width or width
        self._add_stem(stem, channels)
        self.stages = len(stage_sizes)
        net_stride, dilation = 1 if stem == "cifar" else 4, 1
        for stage, size in enumerate(stage_sizes, start=1):
            stride, before = 1, dilation
            if stage > 1 and net_stride == output_stride:
                dilation *= 2
            elif stage > 1:
                stride, net_stride = 2, net_stride * 2
            blocks = []
            for index in range(size):
                inner = width * base_width // 64 * groups
                if index > 0:
                    stride, before = 1, dilation
                # The convolution that strides, or would, still sees the old spacing.
                if not bottleneck:
                    convs = [(3, width, stride, before, 1), (3, width, 1, dilation, 1)]
                elif stride_version == "v1":
                    convs = [
                        (1, inner, stride, 1, 1),
                        (3, inner, 1, dilation, groups),
                        (1, 4 * width, 1, 1, 1),
                    ]
                else:
                    convs = [
                        (1, inner, 1, 1, 1),
                        (3, inner, stride, before, groups),
                        (1, 4 * width, 1, 1, 1),
                    ]
                block = Block(
                    channels,
                    convs,
                    shortcut=shortcut,
                    mean=before if before != dilation else 0,
                    squeeze_excite=squeeze_excite,
                    preactivation=preactivation,
                    first="" if index > 0 else "net" if stage == 1 else "stage",
                )
                blocks.append(block)
                channels = convs[-1][1]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            width *= 2
        self.last = nn.Identity()
        if preactivation:
            layers = {"norm": nn.BatchNorm2d(channels), "relu": nn.ReLU()}
            self.last = nn.Sequential(OrderedDict(layers))
        self.fc = nn.Linear(channels, num_classes)

    def _add_stem(self, stem, channels):
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        elif stem == "deep":
            self.conv1 = nn.Sequential(
                nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(32),
                nn.ReLU(),
                nn.Conv2d(32, 32, 3, padding=1, bias=False),
                nn.BatchNorm2d(32),
                nn.ReLU(),
                nn.Conv2d(32, channels, 3, padding=1, bias=False),
            )
        else:
            self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def features(self, images):
        """The maps: the stem's before its pooling, and every stage's."""
        maps = [self.relu(self.bn1(self.conv1(images)))]
        x = self.maxpool(maps[0])
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
            if stage == self.stages:
                x = self.last(x)
            maps.append(x)
        return maps

    def forward(self, images):
        return self.classify(self.features(images))

    def classify(self, maps):
        """The logits of ``features``' maps."""
        return self.fc(maps[-1].mean((2, 3)))


_LEAF_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_MODULE_NAMES = {
    r"^stem\.conv1": "conv1.0",
    r"^stem\.norm1": "conv1.1",
    r"^stem\.conv2": "conv1.3",
    r"^stem\.norm2": "conv1.4",
    r"^stem\.conv3": "conv1.6",
    r"^stem\.norm3": "bn1",
    r"^stem\.conv": "conv1",
    r"^stem\.norm": "bn1",
    r"^norm": "last.norm",
    r"^head": "fc",
    r"\.norm(\d)": r".bn\1",
    r"\.shortcut_conv": ".downsample.0",
    r"\.shortcut_norm": ".downsample.1",
    r"\.squeeze_excite\.reduce": ".se.fc1",
    r"\.squeeze_excite\.expand": ".se.fc2",
}


def _torch_name(path: tuple[str, ...]) -> str:
    *modules, leaf = path
    name = ".".join([*modules, _LEAF_NAMES[leaf]])
    name = re.sub(
        r"^stage(\d+)\.block(\d+)", lambda m: f"layer{m[1]}.{int(m[2]) - 1}", name
    )
    for pattern, replacement in _MODULE_NAMES.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


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


def make_net(variables: Mapping[str, Any], dtype=np.float64, **options) -> TorchResNet:
    """A net with copies of Flax variables; each must have its one counterpart."""
    with torch.device("meta"):
        net = TorchResNet(**options)
    state = {
        name: _tensor(array, getattr(torch, np.dtype(dtype).name))
        for name, array in to_state_dict(variables).items()
    }
    counters = {
        name: torch.tensor(0)
        for name in net.state_dict()
        if name.endswith("num_batches_tracked")
    }
    net.load_state_dict(state | counters, strict=True, assign=True)
    for tensor in net.parameters():
        tensor.requires_grad_(True)
    return net


@contextlib.contextmanager
def one_torch_thread():
    """Torch's pool and XLA's, on few cores, wait for each other: tenfold the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def evaluate(net: TorchResNet, images: np.ndarray) -> dict[str, np.ndarray]:
    """The maps C1, C2, ..., NHWC, and the logits by the running statistics."""
    net.eval()
    with one_torch_thread(), torch.no_grad():
        maps = net.features(_inputs(net, images))
        results = {
            f"C{index}": array.numpy().transpose(0, 2, 3, 1)
            for index, array in enumerate(maps, start=1)
        }
        return results | {"logits": net.classify(maps).numpy()}


def training_logits(net: TorchResNet, images: np.ndarray) -> np.ndarray:
    """The logits by the batch's own statistics; the running ones move."""
    net.train()
    with one_torch_thread(), torch.no_grad():
        return net(_inputs(net, images)).numpy()


def train(
    net: TorchResNet, batches: np.ndarray, labels: np.ndarray, learning_rate: float
) -> dict[str, Any]:
    """A step of gradient descent on the cross-entropy of each batch.

    Returns:
      The first step's ``logits`` and gradients (``images_gradient``, NHWC, and
      ``params_gradient``); ``params`` and ``batch_stats`` after the last step; and
      ``clearance``, how near any ReLU came to switching and any max-pooling to
      another pixel: the least magnitude of a ReLU's input, or difference between a
      window's two largest numbers.
    """
    clearances = []

    def watch_relu(module, inputs, output):
        clearances.append(inputs[0].detach().abs().min().item())

    def watch_pool(module, inputs, output):
        windows = nn.functional.unfold(inputs[0].detach(), 3, stride=2, padding=1)
        windows = windows.unflatten(1, (-1, 9))
        first, second = windows.topk(2, dim=2).values.unbind(2)
        clearances.append((first - second)[first > 0].min().item())

    hooks = [
        module.register_forward_hook(watch)
        for kind, watch in ((nn.ReLU, watch_relu), (nn.MaxPool2d, watch_pool))
        for module in net.modules()
        if isinstance(module, kind)
    ]
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
    results: dict[str, Any] = {}
    with one_torch_thread():
        for images, answers in zip(batches, labels, strict=True):
            inputs = _inputs(net, images).requires_grad_(True)
            logits = net(inputs)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, torch.tensor(answers)).backward()
            if not results:
                results = {
                    "logits": logits.detach().numpy(),
                    "images_gradient": inputs.grad.numpy().transpose(0, 2, 3, 1),
                    "params_gradient": {
                        name: parameter.grad.numpy().copy()
                        for name, parameter in net.named_parameters()
                    },
                }
            optimizer.step()
    for hook in hooks:
        hook.remove()
    state = {name: value.detach().numpy() for name, value in net.state_dict().items()}
    return results | {
        "params": {name: state[name] for name, _ in net.named_parameters()},
        "batch_stats": {n: v for n, v in state.items() if "running_" in n},
        "clearance": min(clearances),
    }


def _inputs(net: TorchResNet, images: np.ndarray) -> torch.Tensor:
    return _tensor(images.transpose(0, 3, 1, 2), net.fc.weight.dtype)


def _tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A copy; in C order, since torch is many times slower on a transposed array's."""
    return torch.tensor(np.ascontiguousarray(array), dtype=dtype)


def relative_error(ours: Any, expected: np.ndarray) -> float:
    """The largest difference over the largest magnitude."""
    ours = np.asarray(ours, np.float64)
    assert ours.shape == expected.shape
    return np.abs(ours - expected).max() / np.abs(expected).max()
