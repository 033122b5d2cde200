"""Index tables of convolutions over blocks.

A tap is one position in a convolution's kernel. The tables say which source pixel each output pixel
reads by which tap, and which element of an image is where in the patches of the first convolution.
"""

import numpy as np
import torch

from . import winograd
from .packed import CHANNELS, IMAGES, blocks_of
from .plan import Unsupported


class LayerTaps:
    """The taps of one FusedLayer, forward and backward, as `_blocks.convolution` takes them.

    size, output: (height, width) that the layer reads and writes. pixels: those of the output.
    mean: what an average pooling has for weights, fp32 [taps, channels]; None for a convolution.
    tilings: those of `_blocks.winograd`, forward and backward, where that computes the layer.
    """

    def __init__(self, layer, size, output, dtype):
        self.pixels, self.mean, self.tilings = output[0] * output[1], None, None
        if layer.source is None and layer.conv is not None:  # a product with patches
            out = source = np.arange(self.pixels)
            size, tap, taps = output, np.zeros_like(out), 1
        elif layer.conv is not None:
            out, source, tap = pairs(size, *layer.geometry)
            taps = layer.conv.weight[0, 0].numel()
        else:
            if layer.adaptive:
                out, source = adaptive_pairs(size, layer.adaptive)
            else:
                out, source, _ = pairs(size, *layer.geometry)
            tap, weights = means(out)
            taps = len(weights)
            channels = blocks_of(layer.channels) * CHANNELS
            self.mean = weights[:, None].expand(-1, channels).contiguous()
        if winograd.pays(layer, dtype, len(out), output):
            left, _, top, _ = layer.padding
            self.tilings = (*size, top, left, *output), (*output, 2 - top, 2 - left, *size)
        self.forward = lists(out, source, tap, self.pixels, taps)
        self.backward = lists(source, out, tap, size[0] * size[1], taps)


def output_size(size, kernel, stride, dilation, padding):
    """(height, width) after a convolution; padding: left, right, top, bottom."""
    left, right, top, bottom = padding
    around = (top + bottom, left + right)
    return tuple(
        (n + p - d * (k - 1) - 1) // s + 1
        for n, p, k, s, d in zip(size, around, kernel, stride, dilation, strict=True)
    )


def pairs(size, kernel, stride, dilation, padding):
    """int64 arrays (output pixel, source pixel, tap), in order of output pixel and tap."""
    height, width = output_size(size, kernel, stride, dilation, padding)
    y, x, i, j = np.ogrid[:height, :width, : kernel[0], : kernel[1]]
    sy = y * stride[0] - padding[2] + i * dilation[0]
    sx = x * stride[1] - padding[0] + j * dilation[1]
    inside = (sy >= 0) & (sy < size[0]) & (sx >= 0) & (sx < size[1])
    columns = np.broadcast_arrays(y * width + x, sy * size[1] + sx, i * kernel[1] + j)
    return tuple(column[inside] for column in columns)


def adaptive_pairs(size, output):
    """(output pixel, source pixel) of adaptive pooling: output i of n takes floor(i m / n) up to
    ceil((i + 1) m / n) of m pixels."""
    y, x, sy, sx = np.ogrid[: output[0], : output[1], : size[0], : size[1]]
    rows = (sy >= y * size[0] // output[0]) & (sy < -(-(y + 1) * size[0] // output[0]))
    columns = (sx >= x * size[1] // output[1]) & (sx < -(-(x + 1) * size[1] // output[1]))
    out, source = np.broadcast_arrays(y * output[1] + x, sy * size[1] + sx)
    return out[rows & columns], source[rows & columns]


def means(out):
    """(tap of each pair, fp32 [taps] weights) with which the weighted sum over an output pixel's
    pairs is their mean."""
    sizes, tap = np.unique(np.bincount(out)[out], return_inverse=True)
    return tap, torch.from_numpy(1 / sizes).float()


def lists(at, source, tap, count, kernel):
    """(start, table, kernel) as `_blocks.convolution` takes the taps of `count` pixels: pixel p has
    the rows start[p] to start[p + 1] of the table, a source pixel and a tap each. at: the pixel to
    which each pair belongs. kernel: the number of taps of the kernel."""
    order = np.lexsort((tap, at))
    start = np.searchsorted(at[order], np.arange(count + 1)).astype(np.int32)
    table = np.stack([source[order], tap[order]], 1).astype(np.int32)
    return torch.from_numpy(start), torch.from_numpy(table), kernel


def patch_offsets(strides, channels, size, kernel, *args):
    """int32 [P, S], S = channels * taps filled up to a multiple of 32: the place in an image of
    these strides (channel, row, column) that each element of the P patches reads, -1 for zeros."""
    out, source, tap = pairs(size, kernel, *args)
    height, width = output_size(size, kernel, *args)
    taps = kernel[0] * kernel[1]
    offsets = np.full((height * width, blocks_of(channels * taps) * CHANNELS), -1, np.int32)
    row, column = np.divmod(source, size[1])
    for c in range(channels):
        place = c * strides[0] + row * strides[1] + column * strides[2]
        offsets[out, c * taps + tap] = place
    return torch.from_numpy(offsets)


def image_offsets(offsets, elements):
    """int32 [terms, elements]: for each element of an image the places in a group's patches that
    read it, -1 for none: the transpose of `patch_offsets`."""
    pixel, k = np.nonzero(offsets.numpy() >= 0)
    element = offsets.numpy()[pixel, k]
    blocks = offsets.shape[1] // CHANNELS
    place = (pixel * blocks + k // CHANNELS) * IMAGES * CHANNELS + k % CHANNELS
    if place.max(initial=0) >= 2**31:
        raise Unsupported("its images are too large for 32-bit offsets")
    order = np.argsort(element, kind="stable")
    element, place = element[order], place[order]
    term = np.arange(len(element)) - np.searchsorted(element, element)
    table = np.full((term.max(initial=-1) + 1, elements), -1, np.int32)
    table[term, element] = place
    return torch.from_numpy(table)
