"""Networks by name."""

import re
from functools import partial

from torch import nn

from ..errors import UsageError
from .digits_net import DigitsNet
from .dm_wide_resnet import DMWideResNet
from .mobilenet_v2 import MobileNetV2
from .preact_resnet import PreActResNet18
from .resnet import CifarBlock, ResNet
from .vit import ViT
from .wide_resnet import WideResNet

NETWORKS = {
    "digits_net": DigitsNet,
    "mobilenet_v2": MobileNetV2,
    "preact_resnet18": PreActResNet18,
    "resnet18": partial(ResNet, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, (3, 4, 6, 3)),
    "resnet20": partial(ResNet, (3, 3, 3), width=16, block=CifarBlock),
    "resnet56": partial(ResNet, (9, 9, 9), width=16, block=CifarBlock),
    "resnet56_b": partial(ResNet, (9, 9, 9), width=16),
    "vit_tiny": ViT,
}
KNOWN = (
    f"{', '.join(NETWORKS)}, wrn{{depth}}_{{widen}} such as wrn34_10, wrn28_10_silu, dm_wrn28_10"
)


def get(
    name: str, num_classes: int = 10, in_channels: int = 3, width: int | None = None
) -> nn.Module:
    """A freshly initialised network: [B, in_channels, H, W] in [0, 1] -> [B, num_classes] logits.

    `width` is the stem's channel count; None means the published one: 16 for wrn and resnet20 to
    resnet56_b, 32 for digits_net and mobilenet_v2, 64 for the others, 192 for vit_tiny. The last
    nn.Linear is the classifier. Raises ValueError for an unknown name, a depth that no wide ResNet
    has and a width that the network cannot have.
    """
    if width is not None and width < 1:
        raise UsageError(f"width is {width}, must be at least 1")
    size = {} if width is None else {"width": width}
    if name in NETWORKS:
        return NETWORKS[name](num_classes=num_classes, in_channels=in_channels, **size)
    if wide := re.fullmatch(r"(?:wrn(\d+)_(\d+)(_silu)?|dm_wrn(\d+)_(\d+))", name):
        depth, widen, silu, dm_depth, dm_widen = wide.groups()
        if dm_depth:
            return DMWideResNet(int(dm_depth), int(dm_widen), num_classes, in_channels, **size)
        size["activation"] = nn.SiLU if silu else nn.ReLU
        return WideResNet(int(depth), int(widen), num_classes, in_channels, **size)
    raise UsageError(f"unknown model {name!r}; known: {KNOWN}")
