"""Networks by name. All take images in [0, 1] and return logits; none normalises its input."""

import re
from pathlib import Path

from torch import nn

from .. import checkpoint
from .digits_net import DigitsNet
from .resnet import ResNet18
from .wide_resnet import WideResNet

KNOWN = "digits_net, resnet18, wrn{depth}_{widen} such as wrn34_10"
UNUSED = ("sub_block1.",)  # the TRADES WRN-34-10 file carries a stage that its forward never calls


def get(
    name: str, num_classes: int = 10, in_channels: int = 3, width: int | None = None
) -> nn.Module:
    """A freshly initialised network: [B, in_channels, H, W] in [0, 1] -> [B, num_classes] logits.

    `width` is the stem's channel count; None means the published one (digits_net 32, resnet18 64,
    wrn 16). Raises ValueError for an unknown name or a depth that no wide ResNet has.
    """
    size = {} if width is None else {"width": width}
    if name == "digits_net":
        return DigitsNet(num_classes, in_channels, **size)
    if name == "resnet18":
        return ResNet18(num_classes, in_channels, **size)
    if wide := re.fullmatch(r"wrn(\d+)_(\d+)", name):
        return WideResNet(int(wide[1]), int(wide[2]), num_classes, in_channels, **size)
    raise ValueError(f"unknown model {name!r}; known: {KNOWN}")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy the weights in `path` (see `checkpoint.read_weights`) into `model`, in place.

    `sub_block1.*`, which TRADES files carry unused, is ignored, and BatchNorm batch counters may be
    absent. Raises one ValueError that lists every missing, unexpected and misshapen key, and then
    leaves `model` untouched; errors of `read_weights` pass through.
    """
    ours, theirs = model.state_dict(), checkpoint.read_weights(path)
    theirs = {k: v for k, v in theirs.items() if k in ours or not k.startswith(UNUSED)}
    missing = {k for k in ours.keys() - theirs.keys() if not k.endswith(".num_batches_tracked")}
    problems = [f"missing {k}" for k in sorted(missing)]
    problems += [f"unexpected {k}" for k in sorted(theirs.keys() - ours.keys())]
    problems += [
        f"shape of {k}: the model has {list(ours[k].shape)}, the file {list(theirs[k].shape)}"
        for k in ours
        if k in theirs and ours[k].shape != theirs[k].shape
    ]
    if problems:
        found = "; ".join(problems)
        raise ValueError(f"{path} does not fit this {type(model).__name__}: {found}")
    model.load_state_dict(theirs, strict=False)
