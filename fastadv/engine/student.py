"""The student in training: its convolutions on CPU in the form that oneDNN runs right, and its
bfloat16 ones in the form that it runs fastest.

The gradient to the weight of a strided 1x1 convolution in channels_last without padding, of fewer
than 16 input channels, writes outside its memory in torch 2.8 to 2.13 on processors with AVX-512,
with two threads and some sizes of batch: "free(): invalid next size". Here such a layer takes its
pixels first and has no stride.

oneDNN's bfloat16 kernels take up to 16 pixels of one output row at a time and its gradients pass
over all weights once per image, so that small images leave most of an AMX tile empty and reread the
weights; its gradients of strided depthwise convolutions are several times slower than the forward
pass accounts for. Forward and both gradients of a batch of 64, one core with AMX (ms):
512 -> 512 channels at 4x4 74 -> 27, 320 -> 1280 at 4x4, kernel 1, 7.6 -> 2.9, depthwise 576
from 8x8 to 4x4 97 -> 8.4. Float32 gains nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..ops._torch import transformed
from .frozen import InPrecision
from .plan import pair

LANES = 16  # input channels from which on oneDNN's strided gradients stay within their memory
TILE = 16  # output pixels of a row that the kernels take at once
FEW_CHANNELS = 128  # below, copying the images costs more than it saves


class FastStudent(InPrecision):
    """`InPrecision` with `FastConvolutions`.

    Not for networks that recompute activations by torch.utils.checkpoint without reentry, whose
    second forward pass happens outside this one.
    """

    def forward(self, x):
        with FastConvolutions():
            return super().forward(x)


class FastConvolutions(TorchFunctionMode):
    """Within this context `torch.nn.functional.conv2d` is the `conv2d` below."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d:
            return conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """`torch.nn.functional.conv2d`, and its gradients, up to rounding.

    input [B, C, H, W], weight [O, C / groups, kh, kw]. Only on the CPU is there a choice: where
    torch's gradient would write outside its memory, and where input is bfloat16 and channels_last,
    and stride, padding and dilation are pairs, as nn.Conv2d gives them.
    """
    usual = (input, weight, bias, stride, padding, dilation, groups)
    if input.device.type != "cpu":
        return torch.conv2d(*usual)
    if _strided(weight, stride, padding, groups):
        down, right = pair(stride)
        pixels = input[..., ::down, ::right].clone()  # dense, in the order that they had
        return torch.conv2d(pixels, weight, bias)
    low = input.dtype == torch.bfloat16 and input.dim() == 4 and not transformed()
    nhwc = low and input.is_contiguous(memory_format=torch.channels_last)
    pairs = isinstance(padding, tuple) and stride in ((1, 1), (2, 2)) and dilation == (1, 1)
    if not (nhwc and pairs):
        return torch.conv2d(*usual)
    step, shape = stride[0], (*weight.shape[2:], *padding)
    small = groups == 1 and math.ceil(input.shape[3] / step) < TILE
    if small and shape == (1, 1, 0, 0):
        return _pointwise(input, weight, bias, step)
    if small and shape == (3, 3, 1, 1) and input.shape[1] >= FEW_CHANNELS:
        return _side_by_side(input, weight, bias, step)
    if groups == input.shape[1] > 1 and step > 1:
        full = torch.conv2d(input, weight, bias, 1, padding, 1, groups)
        return full[:, :, ::step, ::step].contiguous(memory_format=torch.channels_last)
    return torch.conv2d(*usual)


def _strided(weight, stride, padding, groups):
    """Whether this is a convolution whose gradient to the weight torch may get wrong, see above."""
    if groups > 1 or weight.shape[1] >= LANES or weight.shape[2:] != (1, 1):
        return False
    return max(pair(stride)) > 1 and (padding == "valid" or padding in (0, (0,), (0, 0), [0, 0]))


def _pointwise(x, weight, bias, step):
    """A 1x1 convolution as one product of matrices, [pixels, C] and [C, O]."""
    pixels = x[:, :, ::step, ::step].permute(0, 2, 3, 1)
    return F.linear(pixels, weight.flatten(1), bias).permute(0, 3, 1, 2)


def _side_by_side(x, weight, bias, step):
    """A 3x3 convolution of up to TILE images in one row, the zero padding between them shared.

    Images begin `pitch` pixels apart, a multiple of the stride. Of each output row the pixels that
    belong to the gaps are left out, and their gradient is zero.
    """
    count, width = math.gcd(len(x), TILE), x.shape[3]
    pitch = math.ceil((width + 1) / step) * step
    rows = x.permute(0, 2, 3, 1).unflatten(0, (-1, count)).transpose(1, 2)  # [B', H, count, W, C]
    rows = F.pad(rows, (0, 0, 0, pitch - width)).flatten(2, 3).permute(0, 3, 1, 2)
    out = torch.conv2d(rows, weight, bias, step, 1).permute(0, 2, 3, 1).unflatten(2, (count, -1))
    out = out[:, :, :, : math.ceil(width / step)].transpose(1, 2).flatten(0, 1)
    return out.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
