"""pgd_step in Triton: one projected gradient step, linf or l2; fp32, any dense layout.

    linf: x_adv' = clip(clamp(x_adv + step_size sign(g), x - eps, x + eps), lo, hi)
    l2:   d = x_adv + step_size g / ||g|| - x;  x_adv' = clip(x + d min(1, eps / ||d||), lo, hi)

No FMA contraction: linf gives the bits of the same sequence of torch ops.
"""

import torch
import triton
import triton.language as tl

from .ball import l2_delta, l2_scale, l2_shrink, linf_point, square
from .host import is_dense, mutated
from .rows import clamp

# Provisional: chosen from the compiled code (128-bit accesses, no spills), not yet timed on a GPU.
LINF = {"BLOCK": 1024, "num_warps": 4}
L2 = {"BLOCK": 2048, "num_warps": 8}


@triton.jit
def linf_kernel(
    out, x_adv, grad, x, eps_per_sample, size, blocks, eps, step_size, lo, hi, BLOCK: tl.constexpr
):
    """One block of one sample; without eps_per_sample the whole batch counts as one sample.

    out, x_adv, grad, x: fp32 [samples, size], dense; out may be x_adv. eps_per_sample: fp32
    [samples] or None. blocks: programs per sample.
    """
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    if eps_per_sample is None:
        at += program.to(tl.int64) * BLOCK
        start = tl.cast(0, tl.int64)
    else:
        at += (program % blocks).to(tl.int64) * BLOCK
        start = (program // blocks).to(tl.int64) * size
        eps = tl.load(eps_per_sample + program // blocks)
    inside = at < size
    at += start
    eps, step = tl.cast(eps, tl.float32), tl.cast(step_size, tl.float32)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)
    g = tl.load(grad + at, inside, 0.0)
    origin = tl.load(x + at, inside, 0.0)
    moved = linf_point(tl.load(x_adv + at, inside, 0.0), g, origin, eps, step, lo, hi)
    tl.store(out + at, moved, inside)


@triton.jit
def _step(x_adv, grad, x, at, scale, SIZE: tl.constexpr):
    """(x, x_adv + scale g - x) of the elements `at`."""
    g, origin = tl.load(grad + at, at < SIZE, 0.0), tl.load(x + at, at < SIZE, 0.0)
    return origin, l2_delta(tl.load(x_adv + at, at < SIZE, 0.0), g, origin, scale)


@triton.jit
def l2_kernel(
    out,
    x_adv,
    grad,
    x,
    eps_per_sample,
    eps,
    step_size,
    lo,
    hi,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sample of SIZE elements: ||g||, then ||d||, then the result; arguments as for linf.

    Norms are fp64: the squares of a vanishing gradient underflow in fp32.
    """
    sample = tl.program_id(0)
    start = sample.to(tl.int64) * SIZE
    out, x_adv, grad, x = out + start, x_adv + start, grad + start, x + start
    if eps_per_sample is not None:
        eps = tl.load(eps_per_sample + sample)
    eps, step = tl.cast(eps, tl.float32), tl.cast(step_size, tl.float32)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)
    block = tl.arange(0, BLOCK)

    squares = tl.zeros([BLOCK], tl.float64)
    for first in tl.range(0, SIZE, BLOCK):
        at = first + block
        squares += square(tl.load(grad + at, at < SIZE, 0.0))
    scale = l2_scale(step, tl.sqrt(tl.sum(squares, 0)))

    squares = tl.zeros([BLOCK], tl.float64)
    for first in tl.range(0, SIZE, BLOCK):
        _, delta = _step(x_adv, grad, x, first + block, scale, SIZE)
        squares += square(delta)
    shrink = l2_shrink(tl.sqrt(tl.sum(squares, 0)), eps)

    for first in tl.range(0, SIZE, BLOCK):
        at = first + block
        origin, delta = _step(x_adv, grad, x, at, scale, SIZE)
        tl.store(out + at, clamp(origin + delta * shrink, lo, hi), at < SIZE)


def pgd_step(x_adv, *args):
    """The step as a new tensor."""
    out = torch.empty_like(x_adv)
    _into(out, x_adv, *args)
    return out


def pgd_step_(x_adv, *args):
    """The step written into x_adv."""
    _into(x_adv, x_adv, *args)
    mutated(x_adv)


def _into(out, x_adv, grad, x, eps_per_sample, eps, step_size, norm, lo, hi):
    """Writes the step into `out`, which may be x_adv."""
    if not is_dense(x_adv):
        dense = x_adv.contiguous()
        _into(dense, dense, grad, x, eps_per_sample, eps, step_size, norm, lo, hi)
        out.copy_(dense)
        return
    grad, x = (
        t if t.stride() == x_adv.stride() else torch.empty_like(x_adv).copy_(t) for t in (grad, x)
    )
    per_sample = norm == "l2" or eps_per_sample is not None
    samples = x_adv.shape[0] if per_sample and x_adv.dim() else 1
    size = x_adv.numel() // max(samples, 1)
    if eps_per_sample is not None:
        eps_per_sample = eps_per_sample.contiguous()
    with torch.cuda.device_of(x_adv):
        if norm == "linf":
            blocks = triton.cdiv(size, LINF["BLOCK"])
            linf_kernel[(samples * blocks,)](
                out,
                x_adv,
                grad,
                x,
                eps_per_sample,
                size,
                blocks,
                eps,
                step_size,
                lo,
                hi,
                **LINF,
                enable_fp_fusion=False,
            )
        else:
            l2_kernel[(samples,)](
                out,
                x_adv,
                grad,
                x,
                eps_per_sample,
                eps,
                step_size,
                lo,
                hi,
                size,
                **L2,
                enable_fp_fusion=False,
            )
