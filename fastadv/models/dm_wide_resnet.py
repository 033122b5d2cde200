"""DeepMind's wide ResNet (Gowal et al., arXiv:2010.03593), with the keys that RobustBench uses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .wide_resnet import blocks_per_stage

CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


class Block(nn.Module):
    """Pre-activation block: [B, in, H, W] -> [B, out, H/stride, W/stride].

    A 3x3 convolution of stride 2 pads below and to the right only, as TensorFlow's SAME does.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        self.conv_0 = nn.Conv2d(in_channels, out_channels, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels)
        self.conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.padding = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.silu(self.batchnorm_0(x))
        residual = x if self.shortcut is None else self.shortcut(active)
        inner = F.silu(self.batchnorm_1(self.conv_0(F.pad(active, self.padding))))
        return self.conv_1(inner) + residual


class Stage(nn.Module):
    """A run of blocks under the name `block`; only the first one strides or widens."""

    def __init__(self, blocks: int, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        rest = [Block(out_channels, out_channels, 1) for _ in range(blocks - 1)]
        self.block = nn.Sequential(Block(in_channels, out_channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class DMWideResNet(nn.Module):
    """[B, in_channels, H, W] images in [0, 1] -> [B, num_classes] logits; normalises its input.

    The buffers `mean` and `std` [in_channels, 1, 1] start as CIFAR-100's for 100 classes and as
    CIFAR-10's otherwise (0.5 unless images have 3 channels), the published files' statistics, which
    most of those do not hold. Depth, widen and width are those of `WideResNet`, the activation is
    SiLU. The keys are those of RobustBench's `DMWideResNet(num_classes, depth, widen,
    activation_fn=Swish, mean=..., std=...)`.
    """

    STATISTICS = ("mean", "std")

    def __init__(
        self,
        depth: int,
        widen: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
    ):
        super().__init__()
        blocks, stage = blocks_per_stage(depth, widen), width * widen
        mean, std = published_statistics(num_classes, in_channels)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.init_conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            Stage(blocks, width, stage, stride=1),
            Stage(blocks, stage, 2 * stage, stride=2),
            Stage(blocks, 2 * stage, 4 * stage, stride=2),
        )
        self.batchnorm = nn.BatchNorm2d(4 * stage)
        self.logits = nn.Linear(4 * stage, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.init_conv((x - self.mean) / self.std))
        return self.logits(F.adaptive_avg_pool2d(F.silu(self.batchnorm(x)), 1).flatten(1))


def published_statistics(num_classes: int, in_channels: int) -> tuple[Tensor, Tensor]:
    """The (mean, std) [in_channels, 1, 1] that a new `DMWideResNet` of these arguments has."""
    pair = CIFAR100 if num_classes == 100 else CIFAR10
    if in_channels != 3:
        pair = (0.5,) * in_channels, (0.5,) * in_channels
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in pair)
    return mean, std
