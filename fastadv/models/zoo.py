"""Networks by name."""

import re
from functools import partial

from torch import nn

from ..errors import UsageError
from ..runs.code import check_new, not_registered
from . import libraries
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
OWN = {}  # the networks that users have registered
WIDE_NAME = re.compile(r"(?:wrn(\d+)_(\d+)(_silu)?|dm_wrn(\d+)_(\d+))")
KNOWN = (
    f"{', '.join(NETWORKS)}, wrn{{depth}}_{{widen}} such as wrn34_10, wrn28_10_silu, dm_wrn28_10,"
    " timm:NAME, torchvision:NAME"
)


def register(name, build):
    """Makes `get(name)` the network that `build()` returns: a function or class without arguments.

    The network takes images [B, C, H, W] in [0, 1]. A second function of the same name replaces the
    first. Raises UsageError for a name that fastadv has itself, TypeError for what is no function.
    """
    check_new(name, NETWORKS)
    if WIDE_NAME.fullmatch(name) or libraries.is_of_library(name):
        raise UsageError(f"name is {name!r}, which fastadv has already")
    if not callable(build):
        raise TypeError(f"build is {build!r}, must be a function that returns a network")
    OWN[name] = build


def is_own(name):
    """Whether `name` is, or in a run's record was, that of a network that a user registered."""
    return name in OWN or (":" in name and not libraries.is_of_library(name))


def _own(name, width):
    if name not in OWN:
        raise not_registered("model", name)
    if width is not None:
        raise UsageError(f"width is {width}, but {name}() takes no width")
    try:
        model = OWN[name]()
    except Exception as error:  # whatever a function of the user's own raises; it is the cause
        raise UsageError(f"{name}() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}() is a {type(model).__name__}, must be a torch.nn.Module")
    return model


def get(
    name: str, num_classes: int = 10, in_channels: int = 3, width: int | None = None
) -> nn.Module:
    """A freshly initialised network: [B, in_channels, H, W] in [0, 1] -> [B, num_classes] logits.

    `width` is the stem's channel count; None means the published one: 16 for wrn and resnet20 to
    resnet56_b, 32 for digits_net and mobilenet_v2, 64 for the others, 192 for vit_tiny. The last
    nn.Linear is the classifier. A network that was registered has sizes of its own. "timm:NAME"
    and "torchvision:NAME" are classifiers of these libraries with fresh weights and no width, in a
    `Normalized` network. Raises UsageError for an unknown name, a depth that no wide ResNet has and
    a width or channels that the network cannot have, MissingPackage without the library.
    """
    if width is not None and width < 1:
        raise UsageError(f"width is {width}, must be at least 1")
    if is_own(name):
        return _own(name, width)
    if libraries.is_of_library(name):
        if width is not None:
            raise UsageError(f"width is {width}, but {name} takes no width")
        return libraries.build(name, num_classes, in_channels)
    size = {} if width is None else {"width": width}
    if name in NETWORKS:
        return NETWORKS[name](num_classes=num_classes, in_channels=in_channels, **size)
    if wide := WIDE_NAME.fullmatch(name):
        depth, widen, silu, dm_depth, dm_widen = wide.groups()
        if dm_depth:
            return DMWideResNet(int(dm_depth), int(dm_widen), num_classes, in_channels, **size)
        size["activation"] = nn.SiLU if silu else nn.ReLU
        return WideResNet(int(depth), int(widen), num_classes, in_channels, **size)
    raise UsageError(f"model is {name!r}, must be one of {KNOWN}")
