"""apgd_step_ in Triton: the step of APGD and its bookkeeping, linf or l2; fp32, in place.

    g = grad, 0 where it is not finite; bad_gradients += number of samples with such an element
    better_found: x_found = x_adv;  better_best: x_best, grad_best = x_adv, g
    restart: x_adv, g = x_best, grad_best, after that
    z = P(x_adv + step_size d), d = sign(g) or, under l2, g / ||g||
    x_adv, x_old = P(x_adv + weight (z - x_adv) + (1 - weight) (x_adv - x_old)), x_adv

No FMA contraction: linf gives the bits of the same sequence of torch ops.
"""

import torch
import triton
import triton.language as tl

from .ball import l2_delta, l2_scale, l2_shrink, linf_point, linf_project, square
from .host import is_dense, mutated
from .rows import clamp

# Provisional: chosen from the compiled code (128-bit accesses, no spills), not yet timed on a GPU.
LINF = {"BLOCK": 1024, "num_warps": 4}
L2 = {"BLOCK": 1024, "num_warps": 8}


@triton.jit
def _among(at, size, flag):
    """Whether an element is one of the sample's, if the flag [] is set, else False."""
    return at < tl.where(flag, size, 0)


@triton.jit
def _load(x_adv, x_best, grad, grad_best, at, size, back):
    """(x_adv, grad as it is, and where the step starts, its gradient): x_adv, g or, where the
    sample goes back to its best, those."""
    point, raw = tl.load(x_adv + at, at < size, 0.0), tl.load(grad + at, at < size, 0.0)
    kept = _among(at, size, back)
    start = tl.where(kept, tl.load(x_best + at, kept, 0.0), point)
    return point, raw, start, tl.where(kept, tl.load(grad_best + at, kept, 0.0), _finite(raw))


@triton.jit
def _finite(grad):
    return tl.where(grad - grad == 0, grad, 0.0)


@triton.jit
def _keep(x_best, grad_best, x_found, at, size, better_best, better_found, point, raw):
    """Keeps these elements as the best and found; int32, whether one of the gradient is not
    finite."""
    g, best = _finite(raw), _among(at, size, better_best)
    tl.store(x_found + at, point, _among(at, size, better_found))
    tl.store(x_best + at, point, best)
    tl.store(grad_best + at, g, best)
    return (g != raw).to(tl.int32)


@triton.jit
def _with_momentum(start, z, old, weight, rest):
    """From `start` by `weight` towards z, and on along the last move; rest: 1 - weight."""
    return start + weight * (z - start) + rest * (start - old)


@triton.jit
def linf_ascent_kernel(
    x_adv,
    x_old,
    x_best,
    grad_best,
    x_found,
    bad_gradients,
    grad,
    x,
    step_size,
    better_best,
    better_found,
    restart,
    eps_per_sample,
    eps,
    weight,
    rest,
    lo,
    hi,
    seen,
    size,
    blocks,
    BLOCK: tl.constexpr,
):
    """One block of one sample. x_adv, x_old, x_best, grad_best, x_found, grad, x: fp32 [samples,
    size], dense; bad_gradients: int64, 0-dim; step_size: fp32 [samples]; better_best, better_found,
    restart: bool [samples]; eps_per_sample: fp32 [samples] or None; seen: int32 [samples], zeros;
    blocks: programs per sample."""
    sample = tl.program_id(0) // blocks
    begin = sample.to(tl.int64) * size
    x_adv, x_old, x_found = x_adv + begin, x_old + begin, x_found + begin
    x_best, grad_best, grad, x = x_best + begin, grad_best + begin, grad + begin, x + begin
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    best, found = tl.load(better_best + sample), tl.load(better_found + sample)
    back = tl.load(restart + sample) & (best == 0)
    if eps_per_sample is not None:
        eps = tl.load(eps_per_sample + sample)
    eps, step = tl.cast(eps, tl.float32), tl.load(step_size + sample)
    weight, rest = tl.cast(weight, tl.float32), tl.cast(rest, tl.float32)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)

    point, raw, start, g = _load(x_adv, x_best, grad, grad_best, at, size, back)
    bad = _keep(x_best, grad_best, x_found, at, size, best, found, point, raw)
    if tl.max(bad, 0) > 0:  # the first of the sample's blocks to say so counts it
        before = tl.atomic_xchg(seen + sample, 1, sem="relaxed")
        tl.atomic_add(bad_gradients, (1 - before).to(tl.int64), sem="relaxed")
    origin = tl.load(x + at, inside, 0.0)
    z = linf_point(start, g, origin, eps, step, lo, hi)
    moved = _with_momentum(start, z, tl.load(x_old + at, inside, 0.0), weight, rest)
    tl.store(x_old + at, start, inside)
    tl.store(x_adv + at, linf_project(moved, origin, eps, lo, hi), inside)


@triton.jit
def l2_ascent_kernel(
    x_adv,
    x_old,
    x_best,
    grad_best,
    x_found,
    bad_gradients,
    grad,
    x,
    step_size,
    better_best,
    better_found,
    restart,
    eps_per_sample,
    eps,
    weight,
    rest,
    lo,
    hi,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sample of SIZE elements: ||g||, how far z is from x, how far the move is, the result;
    arguments as for linf. Each pass computes again what an earlier one has computed."""
    sample = tl.program_id(0)
    begin = sample.to(tl.int64) * SIZE
    x_adv, x_old, x_found = x_adv + begin, x_old + begin, x_found + begin
    x_best, grad_best, grad, x = x_best + begin, grad_best + begin, grad + begin, x + begin
    best, found = tl.load(better_best + sample), tl.load(better_found + sample)
    back = tl.load(restart + sample) & (best == 0)
    if eps_per_sample is not None:
        eps = tl.load(eps_per_sample + sample)
    eps, step = tl.cast(eps, tl.float32), tl.load(step_size + sample)
    weight, rest = tl.cast(weight, tl.float32), tl.cast(rest, tl.float32)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)
    block = tl.arange(0, BLOCK)

    squares, bad = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, SIZE, BLOCK):
        at, inside = first + block, first + block < SIZE
        point, raw, _, g = _load(x_adv, x_best, grad, grad_best, at, SIZE, back)
        bad |= _keep(x_best, grad_best, x_found, at, SIZE, best, found, point, raw)
        squares += square(g)
    tl.atomic_add(bad_gradients, tl.max(bad, 0).to(tl.int64), sem="relaxed")
    scale = l2_scale(step, tl.sqrt(tl.sum(squares, 0)))

    squares = tl.zeros([BLOCK], tl.float64)
    for first in tl.range(0, SIZE, BLOCK):
        at, inside = first + block, first + block < SIZE
        _, _, start, g = _load(x_adv, x_best, grad, grad_best, at, SIZE, back)
        squares += square(l2_delta(start, g, tl.load(x + at, inside, 0.0), scale))
    shrink_z = l2_shrink(tl.sqrt(tl.sum(squares, 0)), eps)

    squares = tl.zeros([BLOCK], tl.float64)
    for first in tl.range(0, SIZE, BLOCK):
        at, inside = first + block, first + block < SIZE
        _, _, start, g = _load(x_adv, x_best, grad, grad_best, at, SIZE, back)
        origin, old = tl.load(x + at, inside, 0.0), tl.load(x_old + at, inside, 0.0)
        z = clamp(origin + l2_delta(start, g, origin, scale) * shrink_z, lo, hi)
        delta = _with_momentum(start, z, old, weight, rest) - origin
        squares += square(tl.where(inside, delta, 0.0))  # past the end z may be lo
    shrink = l2_shrink(tl.sqrt(tl.sum(squares, 0)), eps)

    for first in tl.range(0, SIZE, BLOCK):
        at, inside = first + block, first + block < SIZE
        _, _, start, g = _load(x_adv, x_best, grad, grad_best, at, SIZE, back)
        origin, old = tl.load(x + at, inside, 0.0), tl.load(x_old + at, inside, 0.0)
        z = clamp(origin + l2_delta(start, g, origin, scale) * shrink_z, lo, hi)
        delta = _with_momentum(start, z, old, weight, rest) - origin
        tl.store(x_old + at, start, inside)
        tl.store(x_adv + at, clamp(origin + delta * shrink, lo, hi), inside)


def apgd_step_(*args):
    """The step, in place, with the op's arguments. Tensors of another layout than x_adv, and x_adv
    where it is not dense, are copied and written back."""
    images, bad_gradients, (grad, x), rows = args[:5], args[5], args[6:8], args[8:13]
    eps, weight, norm, lo, hi = args[13:]
    x_adv = images[0]
    like = x_adv if is_dense(x_adv) else x_adv.contiguous()
    laid = [
        t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)
        for t in (*images, grad, x)
    ]
    rows = [row if row is None else row.contiguous() for row in rows]
    samples = len(x_adv)
    size = x_adv.numel() // max(samples, 1)
    given = *laid[:5], bad_gradients, *laid[5:], *rows, eps, weight, 1 - weight, lo, hi
    with torch.cuda.device_of(x_adv):
        if norm == "linf":
            blocks = triton.cdiv(size, LINF["BLOCK"])
            seen = torch.zeros(samples, dtype=torch.int32, device=x.device)
            kernel = linf_ascent_kernel[(samples * blocks,)]
            kernel(*given, seen, size, blocks, **LINF, enable_fp_fusion=False)
        else:
            l2_ascent_kernel[(samples,)](*given, size, **L2, enable_fp_fusion=False)
    for tensor, written in zip(images, laid, strict=False):
        if written is not tensor:
            tensor.copy_(written)
    mutated(*images, bad_gradients)
