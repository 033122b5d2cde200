"""The student in training: on a CPU, its convolutions are given to oneDNN in a form that oneDNN
computes right and, in bfloat16, fastest.

Right: in torch 2.8 to 2.13 on processors with AVX-512 the gradient to the weight of some
convolutions writes outside its memory ("free(): invalid next size"), with two threads and some
sizes of batch. They are strided 1x1 convolutions in channels_last without padding, of fewer than 16
input channels. Here such a layer selects its pixels first, and then has no stride.

Fast: oneDNN's bfloat16 kernels compute up to 16 pixels of one output row at a time, and its
gradients pass over all weights once per image. Small images therefore leave most of an AMX tile
empty and read the weights again and again. Its gradients of strided depthwise convolutions take
several times as long as those without a stride. In float32 nothing is gained. Milliseconds of
forward pass and both gradients, for a batch of 64 on one core with AMX:

    convolution                              oneDNN   here
    3x3, 512 -> 512 channels, 4x4 pixels         74     27
    1x1, 320 -> 1280 channels, 4x4 pixels       7.6    2.9
    depthwise, 576 channels, 8x8 -> 4x4          97    8.4
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
    """A student in training: `InPrecision` with `FastConvolutions`.

    It is not for networks that recompute activations by torch.utils.checkpoint without reentry: the
    second forward pass of these happens outside the context.
    """

    def forward(self, x):
        with FastConvolutions():
            return super().forward(x)


class FastConvolutions(TorchFunctionMode):
    """A context in which `torch.nn.functional.conv2d` is the `conv2d` below."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d:
            return conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """The same as `torch.nn.functional.conv2d`, and the same gradients, up to rounding.

    input [B, C, H, W], weight [O, C / groups, kh, kw]. Another form is chosen on CPUs alone: where
    torch's gradient would write outside its memory, and where the input is bfloat16 and
    channels_last, and stride, padding and dilation are pairs, as nn.Conv2d gives them.
    """
    usual = (input, weight, bias, stride, padding, dilation, groups)
    if input.device.type != "cpu":
        return torch.conv2d(*usual)
    if _strided(weight, stride, padding, groups):
        down, right = pair(stride)
        pixels = input[..., ::down, ::right].clone()  # dense, in the same memory format
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
    """Whether torch may get the gradient to this convolution's weight wrong, see above."""
    if groups > 1 or weight.shape[1] >= LANES or weight.shape[2:] != (1, 1):
        return False
    return max(pair(stride)) > 1 and (padding == "valid" or padding in (0, (0,), (0, 0), [0, 0]))


def _pointwise(x, weight, bias, step):
    """A 1x1 convolution as one product of matrices, [pixels, C] and [C, O]."""
    pixels = x[:, :, ::step, ::step].permute(0, 2, 3, 1)
    return F.linear(pixels, weight.flatten(1), bias).permute(0, 3, 1, 2)


def _side_by_side(x, weight, bias, step):
    """A 3x3 convolution of up to TILE images in one row, the zero padding between them shared.

    Images begin `pitch` pixels apart, a multiple of the stride. In each output row the pixels of
    the gaps between images are left out, so that their gradient is zero.
    """
    count, width = math.gcd(len(x), TILE), x.shape[3]
    pitch = math.ceil((width + 1) / step) * step
    rows = x.permute(0, 2, 3, 1).unflatten(0, (-1, count)).transpose(1, 2)  # [B', H, count, W, C]
    rows = F.pad(rows, (0, 0, 0, pitch - width)).flatten(2, 3).permute(0, 3, 1, 2)
    out = torch.conv2d(rows, weight, bias, step, 1).permute(0, 2, 3, 1).unflatten(2, (count, -1))
    out = out[:, :, :, : math.ceil(width / step)].transpose(1, 2).flatten(0, 1)
    return out.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
