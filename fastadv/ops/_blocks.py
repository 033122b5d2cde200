"""The native kernels of the attack engine, which work on blocks of images and channels; no ops.
csrc/engine.h has the shapes of their arguments and of the blocks."""

import torch

from ._native import CPU, DTYPES, addresses, channels_last, contiguous, run


def convolution(blocks, images, weight, taps, out_blocks, *, depthwise=False, dtype, **finish):
    """A convolution of blocks [G, P, C, 16, 32] of so many images, and its finish; see
    `Convolution` and `Finish` in csrc/engine.h. taps: (start int32 [out pixels + 1], pairs int32
    [n, 2], taps of the kernel)."""
    start, pairs, kernel = taps
    in_pixels, in_blocks = blocks.shape[1:3]
    run(
        "depthwise" if depthwise else "convolution",
        CPU,
        *contiguous(CPU, dtype, blocks=blocks),
        *contiguous(CPU, torch.float32 if depthwise else dtype, weight=weight),
        *contiguous(CPU, torch.int32, start=start, pairs=pairs),
        images,
        in_pixels,
        len(start) - 1,
        in_blocks,
        out_blocks,
        kernel,
        DTYPES[dtype],
        *_finish(dtype, **finish),
    )


def winograd(blocks, images, weight, tiling, out_blocks, memory, *, dtype, **finish):
    """The same for a 3 x 3 convolution of stride 1 by Winograd's F(4 x 4, 3 x 3), in float32
    whatever the blocks are of; see `Winograd` in csrc/engine.h. tiling: (height and width of what
    is read, zeros above and to the left of it, height and width of what is written)."""
    in_blocks = blocks.shape[2]
    run(
        "winograd",
        CPU,
        *contiguous(CPU, dtype, blocks=blocks),
        *contiguous(CPU, torch.float32, weight=weight, memory=memory),
        images,
        *tiling,
        in_blocks,
        out_blocks,
        DTYPES[dtype],
        *_finish(dtype, **finish),
    )


def _finish(
    dtype,
    *,
    backward=False,
    activation="none",
    cap=float("inf"),
    out=None,
    active=None,
    slope=None,
    before=None,
    after=None,
    bias=None,
    scale=None,
    shift=None,
):
    slope_dtype = torch.int32 if activation == "relu" else dtype
    return (
        backward,
        activation,
        cap,
        *contiguous(CPU, dtype, out=out, active=active),
        *contiguous(CPU, slope_dtype, slope=slope),
        *contiguous(CPU, dtype, before=before, after=after),
        *contiguous(CPU, torch.float32, bias=bias, scale=scale, shift=shift),
    )


def fold(forward, backward, weight, scale):
    """Writes both layouts of a convolution's weight [O, I, taps], fp32, times scale [O] or None."""
    _fold("fold", forward, backward, weight, scale)


def fold_points(forward, backward, weight, scale):
    """The same for `winograd`, of 9 taps at 36 points."""
    _fold("fold_points", forward, backward, weight, scale)


def _fold(kernel, forward, backward, weight, scale):
    dtype = forward.dtype
    run(
        kernel,
        CPU,
        *contiguous(CPU, dtype, forward=forward, backward=backward),
        *addresses(CPU, torch.float32, weight=weight),
        *contiguous(CPU, torch.float32, scale=scale),
        *weight.shape,
        *weight.stride(),
        DTYPES[dtype],
    )


def to_blocks(maps, blocks):
    """Writes maps [B, C, H, W] in channels_last into blocks [G, H W, C / 32, 16, 32]."""
    _maps("to_blocks", maps, blocks)


def from_blocks(maps, blocks):
    """Writes maps [B, C, H, W] in channels_last, out of their blocks."""
    _maps("from_blocks", maps, blocks)


def _maps(kernel, maps, blocks):
    run(
        kernel,
        CPU,
        *channels_last(CPU, maps.dtype, maps=maps),
        *contiguous(CPU, maps.dtype, blocks=blocks),
        len(maps),
        maps.shape[2:].numel(),
        maps.shape[1],
        DTYPES[maps.dtype],
    )


def patches(out, x, offsets, scale, shift):
    """Writes the patches [G, P, S / 32, 16, 32] of x [B, ...]; offsets int32 [P, S], S = 32 n."""
    run(
        "patches",
        CPU,
        *contiguous(CPU, out.dtype, out=out),
        *addresses(CPU, torch.float32, x=x),
        *contiguous(CPU, torch.float32, scale=scale, shift=shift),
        *contiguous(CPU, torch.int32, offsets=offsets),
        len(x),
        *offsets.shape,
        x.stride(0),
        DTYPES[out.dtype],
    )


def patches_backward(grad, patches, offsets, scale):
    """Writes grad [B, E], the sum of its patches' elements; offsets int32 [terms, E]."""
    terms, elements = offsets.shape
    run(
        "patches_backward",
        CPU,
        *contiguous(CPU, torch.float32, grad=grad, scale=scale),
        *contiguous(CPU, patches.dtype, patches=patches),
        *contiguous(CPU, torch.int32, offsets=offsets),
        len(grad),
        elements,
        terms,
        patches.shape[1] * patches.shape[2] * patches.shape[4],
        DTYPES[patches.dtype],
    )
