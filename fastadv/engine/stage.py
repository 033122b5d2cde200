"""What a trunk is made of."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import _native, reference

IMAGES, CHANNELS = 16, 32  # of a block, see csrc/table.h


class Unsupported(Exception):
    """The network has something that no trunk can express; the message says what."""


def pair(size):
    """(height, width) of what torch takes as one number or two."""
    size = (size,) if isinstance(size, int) else tuple(size)
    return size * 2 if len(size) == 1 else size


def blocks_of(channels):
    """How many blocks of channels these are."""
    return -(-channels // CHANNELS)


@dataclass(eq=False)
class Stage:
    """A convolution (or average pooling) and what follows it up to the next one:

        out = conv(source) + before;  active = activation(affine(out))

    source: the Ref it reads, None for the image. conv: the nn.Conv2d, None for average pooling,
    whose `window` is (size, stride), a pair each, or which is `adaptive` to an output of this
    size. padding: zeros to the left, right, top and bottom. norm: the BatchNorm folded into the
    weights. before: the Ref of the residual. affine: a BatchNorm between out and activation.
    activation: "none", "relu" (up to `cap`) or "silu"; None where nothing reads `active`.
    """

    source: "Ref | None"
    channels: int
    conv: nn.Conv2d | None = None
    window: tuple | None = None
    adaptive: tuple | None = None
    padding: tuple = (0, 0, 0, 0)
    norm: nn.BatchNorm2d | None = None
    before: "Ref | None" = None
    affine: nn.BatchNorm2d | None = None
    activation: str | None = None
    cap: float = float("inf")
    weights: tuple = ()  # (forward, backward), see `fold`
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    readers: dict = field(default_factory=lambda: {"out": [], "active": []})

    @property
    def depthwise(self):
        return self.conv is None or self.conv.groups > 1

    @property
    def geometry(self):
        """(kernel, stride, dilation, padding) of a convolution or a pooling by windows."""
        if self.conv is None:
            return *self.window, (1, 1), self.padding
        conv = self.conv
        return *map(pair, (conv.kernel_size, conv.stride, conv.dilation)), self.padding

    def tensors(self):
        """The parameters and statistics that it computes with."""
        found = [] if self.conv is None else [self.conv.weight, self.conv.bias]
        for norm in (self.norm, self.affine):
            found += [] if norm is None else parts(norm)[:-1]
        return [tensor for tensor in found if tensor is not None]

    def fold(self, dtype):
        """Makes weights, bias, scale and shift from the present parameters."""
        if self.affine is not None:
            scale, shift = affine(self.affine)
            self.scale, self.shift = padded(scale), padded(shift)
        if self.conv is None:
            return
        scale, shift = (None, None) if self.norm is None else affine(self.norm)
        bias = self.conv.bias
        if bias is not None and scale is not None:
            bias = bias * scale
        if shift is not None:
            bias = shift if bias is None else bias + shift
        self.bias = None if bias is None else padded(bias)
        weight = self.conv.weight
        if self.depthwise:
            by_tap = weight.flatten(1) if scale is None else weight.flatten(1) * scale[:, None]
            self.weights = (padded(by_tap.t()),) * 2
            return
        outs, ins = blocks_of(weight.shape[0]), blocks_of(weight[0].numel())
        if self.source is None:  # a product with patches
            weight = weight.flatten(1)[:, :, None]
        else:
            weight = weight.flatten(2)
            ins = blocks_of(weight.shape[1])
        if not self.weights or self.weights[0].dtype != dtype:
            count = outs * ins * weight.shape[2] * CHANNELS**2
            self.weights = tuple(torch.empty(count, dtype=dtype, device="cpu") for _ in range(2))
        _native.fold(*self.weights, weight, scale)


@dataclass(frozen=True)
class Ref:
    """What a stage gives: its "out" or its "active"."""

    stage: Stage
    side: str


def affine(norm):
    """(scale, shift) fp32 [C] of a BatchNorm in eval mode."""
    return reference.bn_affine(*parts(norm))


def parts(norm):
    """(mean, var, gamma, beta, eps) of a BatchNorm; gamma and beta are None where it has none."""
    return norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps


def padded(values):
    """Zeros behind the last dimension, up to whole blocks."""
    return F.pad(values, (0, -values.shape[-1] % CHANNELS)).contiguous()
