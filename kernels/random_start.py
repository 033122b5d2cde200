"""random_start in Triton: clip(x + scale n, lo, hi), one draw n per element.

    init uniform, linf: n = 2 u - 1, u on the grid k 2^-24;    scale = eps
    init uniform, l2:   n ~ N(0, 1), uniform in the ball with  scale = eps v^(1 / size) / ||n||
    init gaussian:      n ~ N(0, 1);                           scale = sigma

Words are Philox4x32-10 (Salmon et al. 2011) under the key `seed`: word element % 4 of the counter
(element // 4, index, step, restart), elements numbered in logical order; v in (0, 1] is word 0 of
the block 0xFFFFFFFF. Without FMA contraction the draws have the bits of the CPU kernel.
"""

import torch
import triton
import triton.language as tl

from .host import is_dense
from .rows import clamp

# Provisional: chosen from the compiled code (128-bit accesses, no spills), not yet timed on a GPU.
SHIFT = {"BLOCK": 1024, "num_warps": 4}
BALL = {"BLOCK": 2048, "num_warps": 8}

TURN = tl.constexpr(3.7450702829239286e-07)  # 2 pi 2^-24
LN2 = tl.constexpr(0.693147180559945309)


@triton.jit
def _radius(word):
    """sqrt(-2 ln u) in fp64 for u = k 2^-24 in (0, 1], k = 1 + the word's upper 24 bits.

    ln u = e ln 2 + ln(1 + f), 1 + f in [sqrt(1/2), sqrt(2)), the last f - f^2 / 2 + f^3 p(f).
    """
    k = ((word >> 8).to(tl.int32) + 1).to(tl.float32)
    bits = k.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    p = 0.12761576 + f * -0.076344967
    p = 0.14201757 + f * (-0.1316018 + f * p)
    p = 0.20001227 + f * (-0.16623357 + f * p)
    p = 0.33333331 + f * (-0.2500082 + f * p)
    near_1 = f.to(tl.float64) + (f * f * (f * p - 0.5)).to(tl.float64)
    return tl.sqrt(-2.0 * ((e - 24).to(tl.float64) * LN2 + near_1))


@triton.jit
def _normal(word0, word1):
    """Two normal draws from two words (Box and Muller 1958): r cos t and r sin t, t = 2 pi k 2^-24.

    The nearest quarter turn q is taken off in integers: the rest is exact and within pi / 4.
    """
    turn = (word1 >> 8).to(tl.int32)
    q = (turn + (1 << 21)) >> 22
    t = (turn - (q << 22)).to(tl.float64) * TURN
    y = t.to(tl.float32)
    z = y * y
    c = z * z * (0.041666646 + z * (-0.0013887316 + z * 2.4433157e-5))
    s = y * (z * (-0.16666655 + z * (0.0083321603 + z * -0.00019515282)))
    r = _radius(word0)
    along = (r * (1.0 - (0.5 * t * t - c.to(tl.float64)))).to(tl.float32)
    across = (r * (t + s.to(tl.float64))).to(tl.float32)
    odd = (q & 1) != 0
    first, second = tl.where(odd, across, along), tl.where(odd, along, across)
    first = tl.where(((q + 1) & 2) != 0, 0.0 - first, first)
    return first, tl.where((q & 2) != 0, 0.0 - second, second)


@triton.jit
def _uniform(word):
    """2 u - 1, exact."""
    return ((word >> 8).to(tl.int32) - (1 << 23)).to(tl.float32) * 1.1920928955078125e-07


@triton.jit
def _words(seed, id, block, step, restart):
    """Four words [blocks] of one sample."""
    none = tl.zeros_like(block)
    id = (none + id).to(tl.uint32)
    step, restart = (none + step).to(tl.uint32), (none + restart).to(tl.uint32)
    return tl.philox(seed, block, id, step, restart)


@triton.jit
def _draw(seed, id, first, step, restart, NORMAL: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 [BLOCK]: the draws of the elements from `first` on, a multiple of 4."""
    block = tl.cast(first // 4, tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    a, b, c, d = _words(seed, id, block, step, restart)
    if NORMAL:
        a, b = _normal(a, b)
        c, d = _normal(c, d)
    else:
        a, b, c, d = _uniform(a), _uniform(b), _uniform(c), _uniform(d)
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(BLOCK)


@triton.jit
def _place(element, CHANNELS: tl.constexpr, PLANE: tl.constexpr):
    """Where an element, numbered as [channels, plane], lies in a sample [plane, channels]."""
    if CHANNELS == 1:
        return element
    return element % PLANE * CHANNELS + element // PLANE


@triton.jit(do_not_specialize=["seed", "step", "restart"])
def shift_kernel(
    out,
    x,
    index,
    eps_per_sample,
    seed,
    step,
    restart,
    blocks,
    scale,
    lo,
    hi,
    NORMAL: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one sample. out, x: fp32 [samples, CHANNELS PLANE], dense, in memory [samples,
    PLANE, CHANNELS]; index: int64 [samples] or None; eps_per_sample: fp32 [samples] or None, else
    scale; blocks: programs per sample."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    if eps_per_sample is not None:
        scale = tl.load(eps_per_sample + sample)
    id = sample if index is None else tl.load(index + sample)
    n = _draw(seed, id, first, step, restart, NORMAL, BLOCK)
    element = first + tl.arange(0, BLOCK)
    inside = element < CHANNELS * PLANE
    at = sample * (CHANNELS * PLANE) + _place(element, CHANNELS, PLANE)
    v = tl.load(x + at, inside, 0.0) + tl.cast(scale, tl.float32) * n
    tl.store(out + at, clamp(v, tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)), inside)


@triton.jit(do_not_specialize=["seed", "step", "restart"])
def ball_kernel(
    out,
    x,
    index,
    eps_per_sample,
    seed,
    step,
    restart,
    scale,
    lo,
    hi,
    CHANNELS: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sample, uniform in its l2 ball: ||n||, then the result; arguments as for shift_kernel."""
    sample = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = CHANNELS * PLANE
    if eps_per_sample is not None:
        scale = tl.load(eps_per_sample + sample)
    id = sample if index is None else tl.load(index + sample)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)
    squares = tl.zeros([BLOCK], tl.float64)
    for first in tl.range(0, SIZE, BLOCK):
        n = _draw(seed, id, first, step, restart, True, BLOCK).to(tl.float64)
        squares += tl.where(first + tl.arange(0, BLOCK) < SIZE, n * n, 0.0)
    norm = tl.sqrt(tl.sum(squares, 0))
    last = tl.zeros([1], tl.uint32) + 0xFFFFFFFF
    word, _, _, _ = _words(seed, id, last, step, restart)
    v = tl.sum(word.to(tl.int64), 0).to(tl.float64) + 1.0
    radius = tl.cast(scale, tl.float32).to(tl.float64) * tl.exp(tl.log(v * 2.0**-32) / SIZE)
    scale = tl.where(norm > 0, radius / norm, 0.0).to(tl.float32)
    for first in tl.range(0, SIZE, BLOCK):
        n = _draw(seed, id, first, step, restart, True, BLOCK)
        element = first + tl.arange(0, BLOCK)
        at = sample * SIZE + _place(element, CHANNELS, PLANE)
        moved = tl.load(x + at, element < SIZE, 0.0) + scale * n
        tl.store(out + at, clamp(moved, lo, hi), element < SIZE)


def random_start(x, seed, index, eps_per_sample, eps, init, norm, sigma, step, restart, lo, hi):
    """The start as a new tensor, in x's layout. x: fp32 [B, ...]; seed: int64, one element, CPU."""
    if init == "zero":
        return x.clamp(lo, hi)
    if not is_dense(x):
        args = (index, eps_per_sample, eps, init, norm, sigma, step, restart, lo, hi)
        return torch.empty_like(x).copy_(random_start(x.contiguous(), seed, *args))
    out = torch.empty_like(x)
    samples = x.shape[0]
    size = x.numel() // max(samples, 1)
    channels = 1 if x.is_contiguous() else x.shape[1]
    if init == "gaussian":
        eps, eps_per_sample = sigma, None
    index, eps_per_sample = (t if t is None else t.contiguous() for t in (index, eps_per_sample))
    args = (out, x, index, eps_per_sample, seed.item(), step, restart)
    shape = channels, size // channels
    with torch.cuda.device_of(x):
        if init == "uniform" and norm == "l2":
            if size:
                ball_kernel[(samples,)](*args, eps, lo, hi, *shape, **BALL, enable_fp_fusion=False)
        else:
            blocks = triton.cdiv(size, SHIFT["BLOCK"])
            normal = init == "gaussian"
            shift_kernel[(samples * blocks,)](
                *args, blocks, eps, lo, hi, normal, *shape, **SHIFT, enable_fp_fusion=False
            )
    return out
