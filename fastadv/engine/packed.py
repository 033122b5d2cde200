"""The weights of a trunk on the CPU, in the form that its kernels read.

Activations and weights are stored in blocks, of 16 images by 32 channels and of 32 by 32 channels
(see csrc/engine.h); channels that a network does not have are filled up with zeros.
"""

import torch
import torch.nn.functional as F

from ..ops import _blocks, _native
from ..ops.fold_bn import bn_affine
from .plan import parts

IMAGES, CHANNELS = 16, 32  # of a block


class PackedLayer:
    """The tensors of one FusedLayer, as of the last `fold`; None for what the layer does not have.

    weights: (of the forward pass, of the backward pass). points: the same at Winograd's points.
    bias: fp32, with the BatchNorm's shift in it. scale, shift: fp32, of the layer's `affine`.
    """

    def __init__(self, layer):
        self.layer = layer
        self.weights = self.points = self.bias = self.scale = self.shift = None

    def fold(self, dtype, winograd):
        """Makes all from the present parameters, `points` in place of `weights` if `winograd`.
        dtype: of the weights of a dense convolution; `points`, and those of depthwise ones, are
        fp32."""
        layer = self.layer
        if layer.affine is not None:
            scale, shift = affine(layer.affine)
            self.scale, self.shift = padded(scale), padded(shift)
        if layer.conv is None:
            return
        scale, shift = (None, None) if layer.norm is None else affine(layer.norm)
        bias = layer.conv.bias
        if bias is not None and scale is not None:
            bias = bias * scale
        if shift is not None:
            bias = shift if bias is None else bias + shift
        self.bias = None if bias is None else padded(bias)
        weight = layer.conv.weight
        if layer.depthwise:
            by_tap = weight.flatten(1) if scale is None else weight.flatten(1) * scale[:, None]
            self.weights = (padded(by_tap.t()),) * 2
            return
        # The first layer is a product with patches: its channels and taps are one dimension.
        weight = weight.flatten(1)[:, :, None] if layer.source is None else weight.flatten(2)
        if winograd:
            points = _native.constant("winograd_points")
            self.points = self.points or room(weight, points, torch.float32)
            _blocks.fold_points(*self.points, weight, scale)
        else:
            self.weights = self.weights or room(weight, weight.shape[2], dtype)
            _blocks.fold(*self.weights, weight, scale)


def room(weight, taps, dtype):
    """Memory for both layouts of a weight [O, I, ...] with so many taps."""
    count = blocks_of(len(weight)) * blocks_of(weight.shape[1]) * taps * CHANNELS**2
    return tuple(torch.empty(count, dtype=dtype, device="cpu") for _ in range(2))


def blocks_of(channels):
    """The number of blocks that hold so many channels."""
    return -(-channels // CHANNELS)


def affine(norm):
    """(scale, shift) fp32 [C] of a BatchNorm in eval mode."""
    return bn_affine(*parts(norm))


def padded(values):
    """The values with zeros behind the last dimension, up to whole blocks."""
    return F.pad(values, (0, -values.shape[-1] % CHANNELS)).contiguous()


def to_blocks(x, blocks):
    """Writes features or gradients x [B, C, H, W] into blocks [G, H W, C / 32, 16, 32], with zeros
    for channels that there are not; returns the blocks."""
    x = x.resolve_neg().to(blocks.dtype).contiguous(memory_format=torch.channels_last)
    _blocks.to_blocks(x, blocks)
    return blocks


def from_blocks(blocks, shape):
    """Features or gradients of this shape, in channels_last, out of their blocks."""
    like = {"dtype": blocks.dtype, "device": blocks.device}
    x = torch.empty(shape, **like, memory_format=torch.channels_last)
    _blocks.from_blocks(x, blocks)
    return x
