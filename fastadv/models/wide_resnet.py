"""Wide residual networks (Zagoruyko and Komodakis, arXiv:1605.07146) with RobustBench's keys."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..ops import batch_norm


def blocks_per_stage(depth: int, widen: int) -> int:
    """n of depth = 6n + 4. Raises UsageError for a depth or widening that no wide ResNet has."""
    if depth < 10 or depth % 6 != 4 or widen < 1:
        raise UsageError(
            f"wrn{depth}_{widen}: depth must be 6n + 4 (10, 16, 22, 28, 34, ...), widen >= 1"
        )
    return (depth - 4) // 6


class Block(nn.Module):
    """Pre-activation block: [B, in, H, W] -> [B, out, H/stride, W/stride].

    Where the channel count changes, the shortcut convolution reads relu(bn1(x)), as the main path
    does; elsewhere the residual is x itself.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        activation: type[nn.Module] = nn.ReLU,
    ):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.relu = activation()
        self.convShortcut = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = batch_norm(self.bn1, x, self.relu)
        residual = x if self.convShortcut is None else self.convShortcut(active)
        return self.conv2(batch_norm(self.bn2, self.conv1(active), self.relu)) + residual


class Stage(nn.Module):
    """A run of blocks under the name `layer`; only the first one strides or widens."""

    def __init__(
        self,
        blocks: int,
        in_channels: int,
        out_channels: int,
        stride: int,
        activation: type[nn.Module],
    ):
        super().__init__()
        rest = [Block(out_channels, out_channels, 1, activation) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(Block(in_channels, out_channels, stride, activation), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """[B, in_channels, H, W] images in [0, 1] -> [B, num_classes] logits; no normalisation inside.

    `depth` counts layers and is 6n + 4 with n >= 1 (UsageError otherwise); the stem has `width`
    channels and the stages `width` times widen, 2 widen and 4 widen. There is no dropout.
    `activation` is nn.ReLU or nn.SiLU, which no weight file tells apart. The keys are those of
    RobustBench's `WideResNet(depth, num_classes, widen)`, which has ReLU only.
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        activation: type[nn.Module] = nn.ReLU,
    ):
        super().__init__()
        blocks, stage = blocks_per_stage(depth, widen), width * widen
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.block1 = Stage(blocks, width, stage, stride=1, activation=activation)
        self.block2 = Stage(blocks, stage, 2 * stage, stride=2, activation=activation)
        self.block3 = Stage(blocks, 2 * stage, 4 * stage, stride=2, activation=activation)
        self.bn1 = nn.BatchNorm2d(4 * stage)
        self.relu = activation()
        self.fc = nn.Linear(4 * stage, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)  # BatchNorm already starts at weight 1, bias 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(batch_norm(self.bn1, x, self.relu), 1).flatten(1))
