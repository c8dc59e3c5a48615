"""The peers in torch; imported only where torch is wanted, since it is optional.

Parameters and multiply-adds are those of ``peers``. Padding is torch's own: the same on
every side.
"""

import torch
from torch import nn

from benchmarks.peers import Layout


class TorchResNet(nn.Module):
    """The net of a layout: images (n, 3, h, w) to logits (n, classes)."""

    def __init__(self, layout: Layout):
        super().__init__()
        channels = layout.width
        if layout.cifar:
            self.stem = nn.Sequential(_conv(3, channels, 3), nn.ReLU(inplace=True))
        else:
            self.stem = nn.Sequential(
                _conv(3, channels, 7, stride=2),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
        blocks = []
        for stage, size in enumerate(layout.stage_sizes):
            width = layout.width * 2**stage
            for index in range(size):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_Block(channels, width, stride, layout.bottleneck))
                channels = 4 * width if layout.bottleneck else width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, layout.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class _Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 of four times the width."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        if bottleneck:
            out = 4 * width
            self.residual = nn.Sequential(
                _conv(channels, width, 1),
                nn.ReLU(inplace=True),
                _conv(width, width, 3, stride),
                nn.ReLU(inplace=True),
                _conv(width, out, 1),
            )
        else:
            out = width
            self.residual = nn.Sequential(
                _conv(channels, width, 3, stride),
                nn.ReLU(inplace=True),
                _conv(width, out, 3),
            )
        changes = stride != 1 or channels != out
        self.shortcut = _conv(channels, out, 1, stride) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


def _conv(channels: int, out: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution without bias and its normalisation."""
    return nn.Sequential(
        nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(out, eps=1e-5, momentum=0.1),
    )
