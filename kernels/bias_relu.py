"""bias_relu in Triton: what follows a convolution in one pass, with one bit per element for the
gradient; fp32, bf16 and fp16 in channels_last, sums in fp32.

    v = x + bias + residual;  y = min(max(v, 0), cap);  out = (grad + other) [0 < v < cap]
"""

import math

import torch
import triton
import triton.language as tl

from .rows import clamp

# Provisional: chosen from the compiled code (128-bit accesses, no spills), not yet timed on a GPU.
CONFIG = {"BLOCK": 2048, "num_warps": 8}


@triton.jit
def bias_relu_kernel(
    y, bits, x, bias, residual, size, cap, stop, C: tl.constexpr, BLOCK: tl.constexpr
):
    """One block. y, x, residual: [size], channels innermost; bias: [C]; residual and bias may be
    None. bits: uint8 [size / 8, rounded up], the first element in the lowest bit. stop: cap, or NaN
    for none, which an infinite v does not reach."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + at % C).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + at, inside, 0.0).to(tl.float32)
    cap = tl.cast(cap, tl.float32)
    tl.store(y + at, clamp(v, 0.0, cap).to(y.dtype.element_ty), inside)
    passes = ((v > 0) & ((v >= stop) == 0)) | (v != v)
    flags = tl.reshape((passes & inside).to(tl.int32), [BLOCK // 8, 8])
    packed = tl.sum(flags << tl.arange(0, 8)[None, :], 1).to(tl.uint8)
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(bits + byte, packed, byte * 8 < size)


@triton.jit
def bias_relu_backward_kernel(out, grad, other, bits, size, BLOCK: tl.constexpr):
    """One block; grad, other, or None, and out: [size] in the order of bits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(grad + at, inside, 0.0).to(tl.float32)
    if other is not None:
        g += tl.load(other + at, inside, 0.0).to(tl.float32)
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    packed = tl.load(bits + byte, byte * 8 < size, 0).to(tl.int32)
    flags = (packed[:, None] >> tl.arange(0, 8)[None, :]) & 1
    passes = tl.reshape(flags, [BLOCK]) != 0
    tl.store(out + at, tl.where(passes, g, 0.0).to(out.dtype.element_ty), inside)


def bias_relu(x, bias, residual, cap):
    """(y, bits)"""
    size, y = x.numel(), torch.empty_like(x)
    bits = torch.empty(triton.cdiv(size, 8), dtype=torch.uint8, device=x.device)
    with torch.cuda.device_of(x):
        bias_relu_kernel[(triton.cdiv(size, CONFIG["BLOCK"]),)](
            y,
            bits,
            x,
            bias,
            residual,
            size,
            cap,
            cap if math.isfinite(cap) else math.nan,
            x.shape[1],
            **CONFIG,
            enable_fp_fusion=False,
        )
    return y, bits


def bias_relu_backward(grad, other, bits):
    """The gradient of x and of the residual."""
    size, out = grad.numel(), torch.empty_like(grad)
    with torch.cuda.device_of(grad):
        bias_relu_backward_kernel[(triton.cdiv(size, CONFIG["BLOCK"]),)](
            out, grad, other, bits, size, **CONFIG, enable_fp_fusion=False
        )
    return out
