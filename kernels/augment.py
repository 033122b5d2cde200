"""augment in Triton: crop, flip and scale by explicit parameters.

out[b, c, h, w] = images[b, c, h + dy - padding, w' + dx - padding] / 255, 0 outside the image;
w' = width - 1 - w where flip[b], else w
"""

import torch
import triton
import triton.language as tl

# Provisional: chosen from the compiled code (128-bit stores, no spills), not yet timed on a GPU.
CONFIG = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _shift(offset, padding, SIZE: tl.constexpr):
    """offset - padding, int32 within [-SIZE, SIZE], where all of the image is outside."""
    least, most = padding - SIZE, padding + SIZE
    return (tl.minimum(tl.maximum(offset, least), most) - padding).to(tl.int32)


@triton.jit
def augment_kernel(
    out,
    images,
    dy,
    dx,
    flip,
    padding,
    blocks,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one image. images: uint8 [batch, CHANNELS, HEIGHT, WIDTH], contiguous; dy, dx:
    int64 [batch]; flip: bool [batch]; out: fp32, contiguous, or [batch, HEIGHT, WIDTH, CHANNELS] in
    memory if LAST; blocks: programs per image."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    SIZE: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    if LAST:
        c, h, w = at % CHANNELS, at // (CHANNELS * WIDTH), at // CHANNELS % WIDTH
    else:
        c, h, w = at // (HEIGHT * WIDTH), at // WIDTH % HEIGHT, at % WIDTH
    w = tl.where(tl.load(flip + image), WIDTH - 1 - w, w)
    h += _shift(tl.load(dy + image), padding, HEIGHT)
    w += _shift(tl.load(dx + image), padding, WIDTH)
    inside = (h >= 0) & (h < HEIGHT) & (w >= 0) & (w < WIDTH) & (at < SIZE)
    pixel = tl.load(images + image * SIZE + (c * HEIGHT + h) * WIDTH + w, inside, 0)
    unit = tl.div_rn(pixel.to(tl.float32), 255.0)
    tl.store(out + image * SIZE + at, unit, at < SIZE)


def augment(images, dy, dx, flip, padding, channels_last):
    """The views, fp32 [B, C, H, W]; arguments as for the op."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(images.shape, device=images.device, memory_format=layout)
    batch, *shape = images.shape
    blocks = triton.cdiv(images[:1].numel(), CONFIG["BLOCK"])
    with torch.cuda.device_of(images):
        augment_kernel[(batch * blocks,)](
            out,
            *(t.contiguous() for t in (images, dy, dx, flip)),
            padding,
            blocks,
            *shape,
            channels_last,
            **CONFIG,
            enable_fp_fusion=False,
        )
    return out
