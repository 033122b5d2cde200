"""ResNets (He et al., arXiv:1512.03385) for 32x32 images, with the public CIFAR codes' keys."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import batch_norm


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: [B, in, H, W] -> [B, out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = self.project(in_channels, out_channels, stride)

    @staticmethod
    def project(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = batch_norm(self.bn1, self.conv1(x), F.relu)
        return batch_norm(self.bn2, self.conv2(out), F.relu, self.shortcut(x))


class PaddedShortcut(nn.Module):
    """Every `stride`-th pixel of x, with channels of zeros around its own: He et al.'s option A."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class CifarBlock(Block):
    """`Block` whose shortcut has no weights, as in section 4.2 of the paper."""

    project = PaddedShortcut


class ResNet(nn.Module):
    """[B, in_channels, H, W] images in [0, 1] -> [B, num_classes] logits; no normalisation inside.

    The stem is one 3x3 convolution of stride 1 with `width` channels; stage k of `blocks[k]` blocks
    has 2^k times as many. Weights start from PyTorch's defaults, as in the public CIFAR codes. The
    keys of resnet18 and resnet34, four stages of `Block` at width 64, are those of RobustBench's
    `ResNet18()` and `ResNet34()`; resnet20 and resnet56 are three stages of `CifarBlock` at 16, and
    resnet56_b, MTARD's clean teacher, of `Block`.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 64,
        block: type[nn.Module] = Block,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = [f"layer{k}" for k in range(1, len(blocks) + 1)]
        before, after = width, width
        for name, count in zip(self.stages, blocks, strict=True):
            stage = [block(before, after, 1 if before == after else 2)]
            stage += [block(after, after, 1) for _ in range(count - 1)]
            setattr(self, name, nn.Sequential(*stage))
            before, after = after, 2 * after
        self.linear = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = batch_norm(self.bn1, self.conv1(x), F.relu)
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
