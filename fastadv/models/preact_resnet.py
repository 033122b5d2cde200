"""PreActResNet-18 (He et al., arXiv:1603.05027) as Rice et al. (arXiv:2002.11569) train it."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import batch_norm


class Block(nn.Module):
    """Pre-activation block: [B, in, H, W] -> [B, out, H/stride, W/stride].

    A projected shortcut reads relu(bn1(x)), as the main path does; elsewhere it is x itself. There
    are public files with the same keys whose shortcut reads x (Wong et al., arXiv:2001.03994);
    those lack the network's last BatchNorm, so that they are refused here, not misread.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection)

    def forward(self, x: Tensor) -> Tensor:
        active = batch_norm(self.bn1, x, F.relu)
        residual = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(batch_norm(self.bn2, self.conv1(active), F.relu)) + residual


class PreActResNet18(nn.Module):
    """[B, in_channels, H, W] images in [0, 1] -> [B, num_classes] logits; no normalisation inside.

    The stem is one 3x3 convolution of stride 1 with `width` channels; the four stages have 1, 2, 4
    and 8 times as many. Weights start from PyTorch's defaults. The keys are those of RobustBench's
    `PreActResNet(PreActBlockV2, [2, 2, 2, 2], bn_before_fc=True)`.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.layer1 = _stage(width, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, stride=2)
        self.bn = nn.BatchNorm2d(8 * width)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.adaptive_avg_pool2d(batch_norm(self.bn, x, F.relu), 1).flatten(1))


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        Block(in_channels, out_channels, stride), Block(out_channels, out_channels, 1)
    )
