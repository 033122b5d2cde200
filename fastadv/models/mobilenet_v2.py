"""MobileNetV2 (Sandler et al., arXiv:1801.04381) for 32x32 images, the public CIFAR code's keys."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import batch_norm

# (expansion, channels at a stem of 32, blocks, stride of the first block)
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class Block(nn.Module):
    """Expand, filter each channel, project: [B, in, H, W] -> [B, out, H/stride, W/stride].

    Stride 1 has a shortcut, a 1x1 convolution where the channel count changes. The activation is
    ReLU, where the paper has ReLU6, and the output is linear.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int):
        super().__init__()
        inner = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.shortcut = nn.Sequential()
        if stride == 1 and in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = batch_norm(self.bn1, self.conv1(x), F.relu)
        out = batch_norm(self.bn2, self.conv2(out), F.relu)
        residual = self.shortcut(x) if self.stride == 1 else None
        return batch_norm(self.bn3, self.conv3(out), residual=residual)


class MobileNetV2(nn.Module):
    """[B, in_channels, H, W] images in [0, 1] -> [B, num_classes] logits; no normalisation inside.

    The stem is a 3x3 convolution of stride 1 with `width` channels (32 published); every other
    channel count scales with it. Weights start from PyTorch's defaults, as in the public code.
    RobustBench has no class for these keys.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 32):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        layers, before = [], width
        for expansion, channels, count, stride in STAGES:
            after = _scaled(channels, width)
            for i in range(count):
                layers.append(Block(before, after, expansion, 1 if i else stride))
                before = after
        last = _scaled(1280, width)
        self.layers = nn.Sequential(*layers)
        self.conv2 = nn.Conv2d(before, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(batch_norm(self.bn1, self.conv1(x), F.relu))
        x = batch_norm(self.bn2, self.conv2(x), F.relu)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _scaled(channels: int, width: int) -> int:
    return max(1, round(channels * width / 32))
